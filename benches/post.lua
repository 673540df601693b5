-- The load of wrk on an HTTP server: POST of JSON to the URL's path, the bodies in
-- turn from the lines of the file that the first argument names. With a second
-- argument the file is one body: a head of JSON of so many bytes, then binary
-- tensors. Prints one line of JSON at the end.

local requests = {}
local turn = 0

function init(args)
  wrk.method = "POST"
  if args[2] then
    wrk.headers["Content-Type"] = "application/octet-stream"
    wrk.headers["Inference-Header-Content-Length"] = args[2]
    local file = io.open(args[1], "rb")
    requests[1] = wrk.format(nil, nil, nil, file:read("*a"))
    file:close()
    return
  end
  wrk.headers["Content-Type"] = "application/json"
  for line in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format(nil, nil, nil, line)
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format(
    'REPORT {"requests_per_second":%.3f,"p50_us":%.1f,"p90_us":%.1f,"p99_us":%.1f,"errors":%d}\n',
    summary.requests / summary.duration * 1e6,
    latency:percentile(50), latency:percentile(90), latency:percentile(99), failed))
end

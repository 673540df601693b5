-- The load of wrk on the FastAPI peer: one sentence per request, in turn, from
-- the file that the first argument names. Prints one line of JSON at the end.

local bodies = {}
local turn = 0

local function quote(text)
  return '"' .. text:gsub('[\\"]', '\\%0'):gsub("%c", " ") .. '"'
end

function init(args)
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
  for line in io.lines(args[1]) do
    if #line > 0 then
      bodies[#bodies + 1] = wrk.format(nil, "/embed", nil, '{"inputs":[' .. quote(line) .. "]}")
    end
  end
end

function request()
  turn = turn % #bodies + 1
  return bodies[turn]
end

function done(summary, latency)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format(
    'REPORT {"requests_per_second":%.3f,"p50_us":%.1f,"p90_us":%.1f,"p99_us":%.1f,"errors":%d}\n',
    summary.requests / summary.duration * 1e6,
    latency:percentile(50), latency:percentile(90), latency:percentile(99), failed))
end

-- Places among a tenant's calls under way, which gateways share. The key is a
-- hash of gateways: how many places each holds, and until when (ms). ARGV: the
-- gateway, the limit, the places that its calls have, the most that it wants,
-- and how long it holds them. Answers with how many it may use.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local key, own = KEYS[1], ARGV[1]
local limit, under_way, most = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local longest = tonumber(ARGV[5])
local held = redis.pcall('HGETALL', key)
-- What none of us wrote is deleted and counts as nothing.
if held.err then
  redis.call('DEL', key)
  held = {}
end
local others = 0
for i = 1, #held, 2 do
  local count, till = string.match(held[i + 1], '^(%d+) (%d+)$')
  till = tonumber(till)
  if not till or till <= now or till > now + longest then
    redis.call('HDEL', key, held[i])
  elseif held[i] ~= own then
    others = others + tonumber(count)
  end
end
-- Calls that are under way hold places, whatever the limit says; they are
-- granted to no call after them.
local granted = math.max(0, math.min(most, limit - others))
local noted = math.max(under_way, granted)
if noted > 0 then
  redis.call('HSET', key, own, string.format('%.0f %.0f', noted, now + longest))
  redis.call('PEXPIRE', key, longest)
else
  redis.call('HDEL', key, own)
end
return granted

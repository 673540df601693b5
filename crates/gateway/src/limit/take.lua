-- Takes from limits that gateways share. Each key has six arguments: 'rate' or
-- 'window', the limit, the burst or the window's milliseconds, what was used
-- without asking, the least that is of use, and the most. Answers for each key
-- what is granted, and how long none is left (µs) or how much is used.
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local answers = {}
-- What stands under a key. What none of us wrote is deleted and counts as nothing.
local function read(key, pattern, longest)
  local value = redis.pcall('GET', key)
  if not value then
    return 0
  end
  if type(value) == 'string' and #value <= longest and string.match(value, pattern) then
    return tonumber(value)
  end
  redis.call('DEL', key)
  return 0
end
for i, key in ipairs(KEYS) do
  local at = (i - 1) * 6
  local limit, extra = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local owed, least, most = tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6])
  local granted, said = 0, 0
  if ARGV[at + 1] == 'rate' then
    local interval = 1 / limit
    local full_at = math.max(read(key, '^%d+%.?%d*$', 24), now)
    local free = math.floor((now - full_at) / interval + extra + 1e-3)
    if free >= least then
      granted = math.min(free, most)
      if granted > 0 then
        full_at = full_at + granted * interval
        local left_ms = math.ceil((full_at - now) * 1000) + 1000
        redis.call('SET', key, string.format('%.9f', full_at), 'PX', string.format('%.0f', left_ms))
      end
    else
      said = math.min(math.ceil((full_at + (least - extra) * interval - now) * 1e6), 1e13)
    end
  else
    said = read(key, '^[1-9]%d*$', 18)
    local free = limit - said - owed
    if free >= least and free > 0 then
      granted = math.min(free, most, math.max(least, math.floor(free / 8)))
    end
    if owed + granted > 0 then
      said = redis.call('INCRBY', key, string.format('%.0f', owed + granted))
      redis.call('PEXPIRE', key, ARGV[at + 3])
    end
  end
  answers[#answers + 1] = granted
  answers[#answers + 1] = said
end
return answers

-- Durable tasks for wrk, in a closed loop: submit, then ask with wait= until the result is there. The connections share
-- one line of task ids, so there are as many tasks under way as connections. Prints what was measured as a line of JSON.
-- Arguments: body file, path to submit to, path to ask at, then "Name: value" headers.
local thread_of_all
local waiting, first, last = {}, 1, 0
ended, submitted, failed = 0, 0, 0

function setup(thread)
   thread_of_all = thread
end

function init(args)
   local file = assert(io.open(args[1], "rb"))
   local body = file:read("*a")
   file:close()
   local headers = {}
   for i = 4, #args do
      local name, value = args[i]:match("^([^:]+): (.*)$")
      headers[name] = value
   end
   ask_path, ask_headers = args[3], headers
   local with_type = {["Content-Type"] = "application/json"}
   for name, value in pairs(headers) do with_type[name] = value end
   submit_line = wrk.format("POST", args[2], with_type, body)
end

function request()
   if first <= last then
      local id = waiting[first]
      waiting[first] = nil
      first = first + 1
      return wrk.format("GET", ask_path .. id, ask_headers)
   end
   return submit_line
end

function response(status, _, body)
   local size = body:match('"result_size":(%d+)')
   if status ~= 200 then
      failed = failed + 1
   elseif size then
      if tonumber(size) > 0 and body:find('"result_code":200', 1, true) then ended = ended + 1 else failed = failed + 1 end
   else
      local id = body:match('"taskID":"([^"]+)"')
      if id then
         submitted = submitted + 1
         last = last + 1
         waiting[last] = id
      else
         failed = failed + 1
      end
   end
end

function done(summary)
   local e = summary.errors
   io.write(string.format('\n{"requests": %d, "seconds": %.6f, "ended": %d, "submitted": %d, "errors": %d}\n',
      summary.requests, summary.duration / 1e6, thread_of_all:get("ended"), thread_of_all:get("submitted"),
      thread_of_all:get("failed") + e.connect + e.read + e.write + e.timeout))
end

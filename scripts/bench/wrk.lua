-- One kind of request for wrk; prints what was measured as a line of JSON.
-- Arguments: body file ("-": GET without a body), milliseconds to wait before each request, then "Name: value" headers.
local wait_ms

function init(args)
   if args[1] ~= "-" then
      local file = assert(io.open(args[1], "rb"))
      wrk.method = "POST"
      wrk.body = file:read("*a")
      file:close()
      wrk.headers["Content-Type"] = "application/json"
   end
   wait_ms = tonumber(args[2])
   for i = 3, #args do
      local name, value = args[i]:match("^([^:]+): (.*)$")
      wrk.headers[name] = value
   end
   if wait_ms > 0 then
      delay = function() return wait_ms end
   end
   request_line = wrk.format()
end

function request()
   return request_line
end

function done(summary, latency)
   local e = summary.errors
   io.write(string.format(
      '\n{"requests": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "max_ms": %.3f, "errors": %d}\n',
      summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3,
      e.connect + e.read + e.write + e.status + e.timeout))
end

// Requests to the server, and their responses as server-sent events over fetch.

const LOST =
  "The connection to the server was lost before the answer was finished. What came until then is kept above. Try again; " +
  "if it happens again, see whether the server is still running.";
const DAMAGED = "Something between this page and the server damaged the answer. Try again.";

// A request that failed. `status` is 0 when the server could not be reached.
export class Refusal extends Error {
  constructor(message, status, retryAfter = null) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

// Send a request (a body makes it a POST) and return the response, or throw a Refusal with the server's own line.
export async function ask(path, { key, body, signal } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refusal("The server cannot be reached. Is it running, and is there a network?", 0);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const message = said?.error?.message ?? `The server answered with status ${response.status}.`;
  throw new Refusal(message, response.status, response.headers.get("Retry-After"));
}

// Yield { event, data } for every event of a response, and event "wait" for a comment: then the request still waits.
// End at [DONE]; throw a Refusal when the stream ends before it.
export async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const piece = await reader.read().catch(() => ({ done: true }));
    signal.throwIfAborted();
    if (piece.done) throw new Refusal(LOST, 0);
    const parts = (rest + piece.value.replaceAll("\r", "")).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      let event = "message";
      const data = [];
      for (const line of part.split("\n")) {
        if (line.startsWith(":")) event = "wait";
        else if (line.startsWith("event:")) event = line.slice(6).trim();
        else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
      }
      if (data[0] === "[DONE]") return;
      let content = null;
      try {
        if (data.length) content = JSON.parse(data.join("\n"));
      } catch {
        throw new Refusal(DAMAGED, 0);
      }
      yield { event, data: content };
    }
  }
}

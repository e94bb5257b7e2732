"""Serving: an OpenAI-compatible API and a page, on the engine that batches requests of any kind and length.

The path of a request, file by file:

1. `middleware.py` checks host, key, type and size; `app.py` finds the route; the body becomes a `GenerationRequest`
   (`protocol.py`).
2. `handlers.py` encodes each prompt (`EncodedPrompt`) and makes an engine `Request` and an `Answer` (`answer.py`) for
   each choice.
3. `worker.py` hands the engine's thread every `Request`; after each pass an `Update` of the answer comes back.
4. `streams.py` follows the updates until the last; `detokenize.py` turns their ids into text that is never taken back.
5. `responses.py` writes the answers as one object or as the events of a stream, in OpenAI's fields.
"""

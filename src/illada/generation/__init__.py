"""Generation: variable-length and fixed-length decoding of many requests at once (spec §5).

The way of a prompt through the room:

- `settings`: how to generate, checked once.
- `request`: a prompt becomes a `Request`, whose answer begins as masks; a template with slots becomes one too.
- `engine`: the oldest requests enter the next pass, each with drafts of the steps that it expects.
- `denoise`: one forward pass over all of them; the masked positions of the active blocks want a token.
- `sampling`: the head turns the states of these positions into `Proposals`: an id, its confidence, a score.
- `unmask`: the scores say which proposals a request commits; the others stay masks.
- `engine` again: a finished block brings the next block or, at its end, the `Generation`.
"""

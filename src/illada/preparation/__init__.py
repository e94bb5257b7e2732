"""Raw text to token shards, and the tokenizer that cuts it."""

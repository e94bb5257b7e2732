def schema_regex(schema, depth=3):
    raise NotImplementedError

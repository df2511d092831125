"""The OpenAI-compatible server: routes, schemas, answers, middleware, keys, the playground."""

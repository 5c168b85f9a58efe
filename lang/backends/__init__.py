"""Where programs run: the protocol, the engine in this process, a server, any endpoint with OpenAI's API."""

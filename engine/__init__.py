"""speeder_engine: multimodal LLM recommendation at one token per item."""

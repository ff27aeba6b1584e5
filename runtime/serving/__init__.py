"""An OpenAI-compatible server over one LLM, for trying a checkpoint locally."""

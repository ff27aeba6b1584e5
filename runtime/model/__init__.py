"""The Qwen3 forward, and how its weights get onto a device."""

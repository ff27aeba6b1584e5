"""What engines are asked, and how their answers are written down, in any engine's environment."""

from __future__ import annotations

from typing import Any


def sampling(tokens: int, prompt_logprobs: bool = False) -> Any:
    """vLLM's greedy decoding, with the log-probability of each token."""
    from vllm import SamplingParams

    asked = 0 if prompt_logprobs else None
    return SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, prompt_logprobs=asked)


def tokens_of(engine: Any, prompt: str | list[int]) -> dict[str, list[int]]:
    """A text is what a user says, in the model's chat template."""
    if not isinstance(prompt, str):
        return {"prompt_token_ids": prompt}
    said = [{"role": "user", "content": prompt}]
    tokenizer = engine.get_tokenizer()
    text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    return {"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}


def answer(output: Any) -> dict[str, Any]:
    """Tokens and log-probabilities, those of the prompt from its second token on if asked for."""
    completion = output.outputs[0]
    chosen = zip(completion.token_ids, completion.logprobs, strict=True)
    given = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False)
    return {
        "prompt": list(output.prompt_token_ids),
        "prompt_logprobs": [step[token].logprob for token, step in given if step],
        "tokens": list(completion.token_ids),
        "logprobs": [step[token].logprob for token, step in chosen],
        "text": completion.text,
    }

"""The tokens of a conversation to train on: the assistant's, with real templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_fast.errors import TrainingError
from lora_fast.training.chat import Conversations
from lora_fast.training.rows import Row

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/…') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_TWIN = MISTRAL.replace(
    "{{ ' ' + message['content'] + eos_token }}",
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}",
)
MARKERS = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen2_5": ["<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "mistral": ["[INST]", "[/INST]"],
}
SYSTEM = {"role": "system", "content": "You cook."}
QUESTIONS = ["How do I cook stew in Łódź?", " And for how many people? <|im_end|> ", "5"]
ANSWERS = ["Start early 🙂.\nBe patient.", "For 5.", "5"]
SHAPES = ["ua", "uaua", "uauaua", "suaua", "uauau", "u"]


def tokenizer_of(family: str, *, markers: bool) -> Any:
    """A byte-level tokenizer; the markers of the family are tokens, or words as any other."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", *(MARKERS[family] if markers else [])]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([*QUESTIONS, *ANSWERS, "user assistant system model"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def messages_of(shape: str) -> list[dict[str, str]]:
    asked, answered = iter(QUESTIONS), iter(ANSWERS)
    found = []
    for letter in shape:
        if letter == "s":
            found.append(SYSTEM)
        elif letter == "u":
            found.append({"role": "user", "content": next(asked)})
        else:
            found.append({"role": "assistant", "content": next(answered)})
    return found


def templates_of(family: str) -> tuple[str, str]:
    if family == "mistral":
        return MISTRAL, MISTRAL_TWIN
    return tuple((TEMPLATES / f"{family}{kind}.jinja").read_text() for kind in ("", "_training"))


def learned(tokenizer: Any, row: Row, train_on: str = "assistant") -> tuple[list[int], list[bool]]:
    return Conversations(tokenizer, train_on).encode(row)


@pytest.mark.parametrize("markers", [True, False], ids=["tokens", "words"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", [family for family in MARKERS if family != "qwen3"])
def test_the_tokens_that_trl_s_training_template_marks(
    family: str, shape: str, markers: bool
) -> None:
    plain, twin = templates_of(family)
    if "s" in shape and family in ("gemma", "mistral"):
        shape = shape.replace("s", "")  # they have no system message
    tokenizer = tokenizer_of(family, markers=markers)
    row = Row(messages=messages_of(shape))
    tokenizer.chat_template = twin
    expected = tokenizer.apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer.chat_template = plain
    ids, mask = learned(tokenizer, row)
    assert ids == expected["input_ids"]
    assert mask == [bool(m) for m in expected["assistant_masks"]]
    assert any(mask) == ("a" in shape)
    whole, everything = learned(tokenizer, row, "all")
    assert whole == ids and all(everything)


@pytest.mark.parametrize("shape", ["ua", "uaua", "suauaua"])
def test_a_template_that_writes_the_last_turn_in_another_way(shape: str) -> None:
    """Qwen 3 puts an empty thought before the last answer, and takes it away when more follows."""
    tokenizer = tokenizer_of("qwen3", markers=True)
    tokenizer.chat_template = templates_of("qwen3")[0]
    messages = messages_of(shape)
    ids, mask = learned(tokenizer, Row(messages=messages))
    said = tokenizer.decode([i for i, keep in zip(ids, mask, strict=True) if keep])
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    thought = "<think>\n\n</think>\n\n"
    assert said == "".join(f"{a}<|im_end|>\n" for a in [*answers[:-1], thought + answers[-1]])


def test_a_tokenizer_without_offsets_finds_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for family in ("llama3", "phi3", "mistral"):
        tokenizer = tokenizer_of(family, markers=True)
        tokenizer.chat_template = templates_of(family)[0]
        row = Row(messages=messages_of("uaua"))
        expected = learned(tokenizer, row)
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
            assert learned(tokenizer, row) == expected


def test_tools_and_calls_reach_the_template() -> None:
    tokenizer = tokenizer_of("qwen2_5", markers=True)
    plain, twin = templates_of("qwen2_5")
    call = {"function": {"name": "stew", "arguments": {"city": "Oslo"}}}
    row = Row(
        messages=[
            {"role": "user", "content": "Stew?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "yes"},
            {"role": "assistant", "content": "Yes."},
        ],
        tools=[{"type": "function", "function": {"name": "stew", "parameters": {}}}],
    )
    tokenizer.chat_template = twin
    expected = tokenizer.apply_chat_template(
        row["messages"], tools=row["tools"], tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    tokenizer.chat_template = plain
    ids, mask = learned(tokenizer, row)
    assert ids == expected["input_ids"] and '"stew"' in tokenizer.decode(ids)
    assert mask == [bool(m) for m in expected["assistant_masks"]]


SHUFFLED = "{% for m in messages|reverse %}{{ m['content'] + ' ' }}{% endfor %}"
COUNTED = "{% for m in messages %}{{ messages|length ~ m['role'] ~ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("template", [SHUFFLED, COUNTED])
def test_turns_that_cannot_be_told_apart_stop_with_what_to_do(template: str) -> None:
    tokenizer = tokenizer_of("mistral", markers=False)
    tokenizer.chat_template = template
    row = Row(messages=messages_of("uaua"))
    row.where = "data.jsonl, line 7"
    with pytest.raises(TrainingError, match=r"^data\.jsonl, line 7: .* with --train-on all, or"):
        learned(tokenizer, row)
    assert all(learned(tokenizer, row, "all")[1])


def test_what_the_template_refuses_is_told_with_its_line() -> None:
    tokenizer = tokenizer_of("mistral", markers=False)
    tokenizer.chat_template = MISTRAL
    row = Row(messages=messages_of("u") * 2)
    row.where = "data.jsonl, line 3"
    with pytest.raises(TrainingError, match=r"data\.jsonl, line 3: the chat template refused .*al"):
        learned(tokenizer, row)
    tokenizer.chat_template = None
    with pytest.raises(TrainingError, match="has no chat template: give 'text' instead"):
        learned(tokenizer, row)

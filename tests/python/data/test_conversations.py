"""What a chat template makes of conversations: compared with what went in, and told where it is not what one thinks."""

import json

import pytest

from corpus import EOS, RENDERED, TEMPLATE, TURNS, documents, make_tokenizer, ready
from megatrain_io.errors import DataError

# As Qwen3's does: earlier reasoning is left out, and the last answer always has some.
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}"
    "{% if loop.last %}<think>\n{{ parts[0].split('<think>')[-1].strip() if parts|length > 1 }}"
    "\n</think>\n\n{% endif %}"
    "{{ parts[-1].strip() }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As DeepSeek-R1's: it asks with <think>, and leaves all reasoning out of what was answered.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].strip() if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
REASONED = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nThe porter"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "<think>\nSo.\n</think>\n\nHe can"},
]


def made_of(tmp_path, messages, template=TEMPLATE, **options):
    row = messages if isinstance(messages, dict) else {"messages": messages}
    return ready(tmp_path, [row], tokenizer=make_tokenizer(template=template), **options)


def notes_of(made):
    return tuple(note for note in made.summary.notes if "packing" not in note)


def asked(template, messages, tokenizer=None):
    tokenizer = tokenizer or make_tokenizer(template=template)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def rendered(template, messages):
    return make_tokenizer(template=template).apply_chat_template(messages, tokenize=False)


# --------------------------------------------------------------------------------- templates that rewrite


def test_each_answer_is_trained_as_it_will_be_asked_where_the_template_rewrites(tmp_path):
    """Both answers were refused, and the cure that was offered replaces the model's own format."""
    made = made_of(tmp_path, REASONED, REWRITES)
    expected = []
    for turn in (1, 3):
        prompt, whole = asked(REWRITES, REASONED[:turn]), rendered(REWRITES, REASONED[: turn + 1])
        answer = whole[len(prompt) :].removesuffix("\n")
        assert whole == f"{prompt}{answer}\n"
        assert answer.endswith("<|im_end|>")
        expected.append(f"{prompt}{{+{answer}+}}\n")
    assert documents(made.train) == expected
    assert "Hm." in expected[0]
    assert "Hm." not in expected[1]
    assert notes_of(made)[0].startswith("1 example (first ")
    assert (
        "Each answer is trained in a row of its own, as the model meets it when asked." in notes_of(made)[0]
    )
    assert made.summary.longest == max(
        len(tokens_of(text.replace("{+", "").replace("+}", ""))) for text in expected
    )


def tokens_of(text):
    return make_tokenizer()(text)["input_ids"]


def test_rows_of_answers_are_the_tokens_of_the_template_one_by_one(tmp_path):
    made = made_of(tmp_path, REASONED, REWRITES, packing=False)
    for row, turn in enumerate((1, 3)):
        ids = made.train.micro_batch([row]).input_ids[0].tolist()
        assert ids == tokens_of(rendered(REWRITES, REASONED[: turn + 1]))
        labels = made.train.micro_batch([row]).shift_labels[0].tolist()
        prompt = len(tokens_of(asked(REWRITES, REASONED[:turn])))
        assert labels == [-100] * (prompt - 1) + ids[prompt:-1] + [-100, -100], "not the line break behind it"


def test_one_answer_of_such_a_template_needs_no_row_of_its_own(tmp_path):
    made = made_of(tmp_path, REASONED[:2], REWRITES)
    assert notes_of(made) == ()
    made = made_of(tmp_path, TURNS[:2], REWRITES)
    (note,) = notes_of(made)
    assert (
        r"the chat template puts '<think>\n\n</think>\n\n' before the answer, which is trained with it."
        in note
    )


@pytest.mark.parametrize(
    ("content", "trained"),
    [
        ("The porter", "The porter<|im_end|>"),
        ("<b>The</b> porter", "<b>The</b> porter<|im_end|>"),
        ("<think>\nHm.\n</think>\n\nThe porter", "Hm.\n</think>\n\nThe porter<|im_end|>"),
        ("<think>Hm.</think>The porter", "Hm.</think>The porter<|im_end|>"),
        ("\n<think>\nHm.\n\n</think>The\n\nporter\n", "Hm.\n\n</think>The\n\nporter<|im_end|>"),
    ],
)
def test_an_answer_is_trained_behind_what_it_is_asked_with(tmp_path, content, trained):
    """R1 asks with <think>; what was trained did not begin with it, and reasoning of the data was lost."""
    messages = [TURNS[0], {"role": "assistant", "content": content}]
    made = made_of(tmp_path, messages, THINKS)
    prompt = asked(THINKS, messages[:1])
    assert prompt.endswith("<think>\n")
    assert documents(made.train) == [f"{prompt}{{+{trained}+}}\n"]
    assert r"asks for an answer with '<think>\n' at the end" in notes_of(made)[0]
    assert not any("leaves out text" in note for note in notes_of(made))


@pytest.mark.parametrize(
    ("content", "trained"),
    [
        ("Yo", "Yo!"),
        ("<b>Yo</b>", "<b>Yo</b>!"),
        ("<think>\nHm.\n</think>\nYo", "Hm.\n</think>\nYo!"),
    ],
)
def test_a_header_without_a_token_or_a_space_at_its_end_is_told_from_the_answer(tmp_path, content, trained):
    """As where R1's template is used with a tokenizer that has none of its tokens."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1].strip() }}!{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
    )
    made = made_of(tmp_path, [TURNS[0], {"role": "assistant", "content": content}], template)
    assert documents(made.train) == [f"[user]Hi![assistant]<think>\n{{+{trained}{EOS}+}}"]


def test_a_template_that_ends_with_eos_only_when_nothing_follows_trains_each_answer(tmp_path):
    """As Phi-4-mini's does."""
    template = TEMPLATE.replace("\n{% endfor %}", "{% endfor %}").replace(
        "{% endif %}", "{% else %}{{ eos_token }}{% endif %}"
    )
    made = made_of(tmp_path, TURNS, template)
    first, second = documents(made.train)
    assert first == asked(template, TURNS[:1]) + f"{{+Yo<|im_end|>{EOS}+}}"
    assert second == asked(template, TURNS[:3]) + f"{{+So long<|im_end|>{EOS}+}}"


def test_such_answers_get_a_row_each(tmp_path):
    made = made_of(tmp_path, REASONED, THINKS)
    first, second = documents(made.train)
    assert first == asked(THINKS, REASONED[:1]) + "{+Hm.\n</think>\n\nThe porter<|im_end|>+}\n"
    assert [note.partition(" (first")[0] for note in notes_of(made)] == ["1 example", "1 example"]
    assert second == asked(THINKS, REASONED[:3]) + "{+So.\n</think>\n\nHe can<|im_end|>+}\n"


def test_all_of_it_is_trained_in_one_row_on_request(tmp_path):
    made = made_of(tmp_path, REASONED, REWRITES, assistant_only_loss=False)
    (text,) = documents(made.train)
    assert text.replace("{+", "").replace("+}", "") == rendered(REWRITES, REASONED)
    assert "leaves out text of a turn" in notes_of(made)[0]


# ----------------------------------------------------------------------- templates that leave out and add

CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "clock", "arguments": {"zone": "CET"}}}],
}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
KNOWS_TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tool_calls_that_the_template_does_not_show_are_refused_with_their_number(tmp_path):
    """An empty answer was trained, and the tools vanished."""
    row = {"messages": [TURNS[0], CALL], "tools": TOOLS}
    content = [{"messages": TURNS}, row, row]
    with pytest.raises(DataError) as refused:
        ready(tmp_path, content)
    assert str(refused.value).replace(f"{tmp_path}/in/", "") == (
        "data.jsonl line 2: the chat template does not show the tool_calls of an answer, and nothing else is in it: "
        "the model would learn to answer nothing. So it is with 2 of 3 examples there. Choose a data.chat_template "
        "that knows tools, or remove these examples."
    )
    made = made_of(tmp_path, row, KNOWS_TOOLS)
    assert notes_of(made) == ()
    assert '{+{"name": "clock", "arguments": {"zone": "CET"}}<|im_end|>+}' in documents(made.train)[0]
    assert (
        made_of(tmp_path, {**row, "tools": json.dumps(TOOLS)}, KNOWS_TOOLS).train.sha256 == made.train.sha256
    )


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({"messages": TURNS, "tools": TOOLS}, "the chat template does not show the tools."),
        (
            {"messages": [{**TURNS[0], "name": "Ann"}, TURNS[1]]},
            "the chat template does not show name of the turns.",
        ),
        (
            {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "Hm"}]},
            "does not show reasoning_content of",
        ),
        (
            {"messages": [TURNS[0], {**TURNS[1], "content": ""}]},
            "an answer is empty, and the model is trained to end",
        ),
        ({"prompt": "Hi", "completion": " "}, "an answer is empty, and the model is trained to end"),
        ({"instruction": "Hi", "output": ""}, "an answer is empty, and the model is trained to end"),
    ],
    ids=str,
)
def test_what_is_left_out_is_noted_with_its_number(tmp_path, row, note):
    made = ready(tmp_path, [row, row, {**row, "id": 7}])
    (found,) = [n for n in notes_of(made) if "data.jsonl line 1)" in n]
    assert found.startswith("3 examples (first ")
    assert note in found
    assert "keys of the data that are not used: id (1 times)." in " ".join(notes_of(made))
    again = ready(tmp_path, [row, row, {**row, "id": 7}])
    assert again.reused
    assert again.summary == made.summary


def test_a_system_turn_that_is_left_out_is_noted_and_one_that_is_added_too(tmp_path):
    system = {"role": "system", "content": "You are the porter."}
    ignores = "{% for message in messages if message.role != 'system' %}" + TEMPLATE.partition("%}")[2]
    assert "leaves out text of a turn" in notes_of(made_of(tmp_path, [system, *TURNS], ignores))[0]
    adds = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\n" + TEMPLATE
    assert (
        "adds a beginning of its own: '<|im_start|>system\\nYou are Qwen"
        in notes_of(made_of(tmp_path, TURNS, adds))[0]
    )
    assert notes_of(made_of(tmp_path, [system, *TURNS])) == ()


def test_white_space_json_and_trimming_are_no_loss(tmp_path):
    template = TEMPLATE.replace(
        "message['content']", "(message['content'] | trim if loop.first else message['content'] | tojson)"
    )
    turns = [{"role": "user", "content": '  a\n"b" '}, {"role": "assistant", "content": "c\n\td\u00e9"}]
    assert notes_of(made_of(tmp_path, turns, template)) == ()


# ------------------------------------------------------------------------------------- keys of the data

SYSTEM = "<|im_start|>system\nYou are the porter.<|im_end|>\n"
EARLIER = "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n{+B<|im_end|>+}\n"
LAST = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{+Yo<|im_end|>+}\n"

LATER = RENDERED.replace("{+Yo<|im_end|>+}", "Yo<|im_end|>")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Hi", "output": "Yo", "system": "You are the porter."}, SYSTEM + LAST),
        ({"instruction": "Hi", "output": "Yo", "history": [["A", "B"]]}, EARLIER + LAST),
        ({"instruction": "Hi", "output": "Yo", "system": "You are the porter.", "history": [["A", "B"]]},
         SYSTEM + EARLIER + LAST),
        ({"instruction": "Hi", "output": "Yo", "system": None, "history": []}, LAST),
        ({"messages": TURNS[:2], "system": "You are the porter."}, SYSTEM + LAST),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}],
          "system": "You are the porter."}, SYSTEM + LAST),
        ({"messages": [{"role": "system", "content": "You are the porter."}, *TURNS[:2]],
          "system": "You are the porter."}, SYSTEM + LAST),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]}, LATER),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 1}, *TURNS[2:]]}, RENDERED),
    ],
)  # fmt: skip
def test_keys_that_mean_something_are_used(tmp_path, row, expected):
    """System prompts and earlier turns were dropped without a word."""
    made = ready(tmp_path, [row])
    assert documents(made.train) == [expected]
    assert notes_of(made) == ()


def test_they_are_used_without_a_template_too(tmp_path):
    row = {"instruction": "Hi", "output": "Yo", "system": "You are the porter.", "history": [["A", "B"]]}
    made = ready(tmp_path, [row], tokenizer=make_tokenizer(template=None))
    (text,) = documents(made.train)
    assert text == (
        "You are the porter.\n\n### Instruction:\nA\n\n### Response:\nB\n\n### Instruction:\nHi\n\n### Response:\n"
        f"{{+Yo{EOS}+}}"
    )
    assert "under the heading '### Instruction:'" in notes_of(made)[0]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"messages": TURNS, "images": ["a.png"]}, "line 1 has images, and only text is trained. Remove the line"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]}, r"messages\[1\]: weight is 0.5 for a turn of the"),
        ({"messages": [{**TURNS[0], "weight": 1}, TURNS[1]]}, r"messages\[0\]: weight is 1 for a turn of the user. It"),
        ({"messages": [TURNS[0], {**TURNS[1], "train": False}]}, r"messages\[1\] has the key train, which is not read"),
        ({"messages": [TURNS[0], {**TURNS[1], "loss_mask": 0}]}, r"messages\[1\] has the key loss_mask, which is not"),
        ({"messages": [{"role": "system", "content": "A"}, *TURNS], "system": "B"}, "another system beside. Keep one"),
        ({"messages": TURNS, "tools": "clock"}, "tools is text that is not JSON"),
        ({"instruction": "Hi", "output": "Yo", "history": "A"}, "history must be a list of pairs of texts"),
        ({"instruction": "Hi", "output": "Yo", "history": 2.5}, "history must be a list of pairs of texts"),
        ({"instruction": "Hi", "output": "Yo", "history": [["A"]]}, "history must be a list of pairs of texts"),
        ({"instruction": "Hi", "output": "Yo", "system": ["A"]}, "system is a list; it must be text"),
    ],
)  # fmt: skip
def test_keys_that_would_change_what_is_trained_are_refused_otherwise(tmp_path, row, error):
    with pytest.raises(DataError, match=error):
        ready(tmp_path, [row])


def test_other_keys_are_named_with_their_number(tmp_path):
    rows = [{"text": "a b", "id": i, "source": "x", "empty": None} for i in range(3)]
    (note,) = notes_of(ready(tmp_path, rows))
    assert note.startswith(
        "keys of the data that are not used: id (3 times), source (3 times). Map them with data"
    )


def test_the_same_share_is_held_out_as_before_there_were_earlier_turns(tmp_path):
    made = ready(tmp_path, [{"instruction": f"Q{i}", "output": f"A{i}"} for i in range(20)], eval=0.2)
    assert sorted(text.split("\n")[1] for text in documents(made.eval)) == [
        f"Q{i}<|im_end|>" for i in (15, 17, 5, 7)
    ]


# ----------------------------------------------------------------------------------- prompts as they stand


def test_prompts_beside_a_chat_template_say_so_and_the_key_that_is_named_helps(tmp_path):
    """They were trained without the template, and `generate --chat` asks with it."""
    csv = "question,answer\nHi,Yo\n"
    fields = {"prompt": "question", "completion": "answer"}
    made = ready(tmp_path, csv, "a.csv", fields=fields)
    assert documents(made.train) == [f"Hi{{+Yo{EOS}+}}"]
    (note,) = notes_of(made)
    assert note == (
        "prompt and completion (1 example) are trained as they stand, and not in the model's chat template: ask the "
        "trained model without --chat. To train them in the template, set data.fields: {instruction: question, output: "
        "answer}."
    )
    made = ready(tmp_path, csv, "a.csv", fields={"instruction": "question", "output": "answer"})
    assert documents(made.train) == [LAST]
    assert notes_of(made) == ()
    made = ready(tmp_path, csv, "a.csv", fields=fields, tokenizer=make_tokenizer(template=None))
    assert notes_of(made) == ()
    rows = [{"prompt": "Hi", "completion": "Yo"}]
    assert "{instruction: prompt, output: completion}" in notes_of(ready(tmp_path, rows))[0]
    made = ready(tmp_path, rows, fields={"instruction": "prompt", "output": "completion"})
    assert documents(made.train) == [LAST], (
        "what is named is meant, though the names of another format are there"
    )


# --------------------------------------------------------------------------------------- what ends an answer


@pytest.mark.parametrize(
    ("rows", "ends"),
    [
        ([{"messages": TURNS}], ["<|im_end|>"]),
        ([{"text": "a b"}], [EOS]),
        ([{"prompt": "a", "completion": "b"}, {"messages": TURNS}], [EOS, "<|im_end|>"]),
    ],
    ids=str,
)
def test_what_ends_answers_is_found_by_rendering(tmp_path, rows, ends):
    for i, row in enumerate(rows):
        made = ready(tmp_path / str(i), [row])
        assert make_tokenizer().convert_ids_to_tokens(list(made.stop_tokens)) == [ends[i]]
        assert ready(tmp_path / str(i), [row]).stop_tokens == made.stop_tokens, "from the cache, too"


def test_a_mark_that_is_no_token_is_noted(tmp_path):
    template = TEMPLATE.replace("<|im_end|>", "[/TURN]")
    made = made_of(tmp_path, TURNS[:2], template)
    (note,) = notes_of(made)
    assert "answers end with '[/TURN]', which is no single token of this tokenizer" in note
    assert make_tokenizer().convert_ids_to_tokens(list(made.stop_tokens)) == [EOS]

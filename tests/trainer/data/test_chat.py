"""Chat templates render as `transformers` renders them, and refuse what it refuses."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from sharding.errors import UsageError
from trainer.data.chat import ChatTemplate
from trainer.data.clean import Rejected
from trainer.data.tokenizer import open_tokenizer, train_bpe

SPECIALS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "unk_token": "<|pad|>"}
SYSTEM = {"role": "system", "content": "Answer in <b>one</b> word & 'no more'."}
CHAT = [
    {"role": "user", "content": '  naïve "quotes" <tag>?\n'},
    {"role": "assistant", "content": "Yes.", "tool_calls": None},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "No.", "thinking": "short"},
]
TOOLS = [
    {"role": "user", "content": "What is 1 < 2?"},
    {
        "role": "assistant", "content": "",
        "tool_calls": [{"function": {"name": "less", "arguments": {"b": 2, "a": [1, "é<&>'"]}}}],
    },
    {"role": "tool", "content": {"result": True, "why": "1 < 2"}},
    {"role": "assistant", "content": "It is."},
]  # fmt: skip

# In the styles that the common model families use, written for this test.
TEMPLATES = {
    "header": (
        "{%- if not now is defined %}{% set now = strftime_now('%Y') %}{% endif -%}\n"
        "{{- bos_token }}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system = messages[0]['content'] | trim %}\n"
        "    {%- set messages = messages[1:] %}\n"
        "{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n"
        "{{- '[system]\\nThe year is ' ~ now ~ '\\n' ~ system ~ eos_token }}\n"
        "{%- for message in messages %}\n"
        "{{- '[' + message.role + ']\\n' + message['content'] | string | trim + eos_token }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
    ),
    "turns": (
        "{% for message in messages %}{% if loop.first and messages[0].role != 'system' %}"
        "{{ '<s>system\\nHelp.</s>\\n' }}{% endif %}"
        "{{ '<s>' + message.role + '\\n' }}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}\n"
        "{% else %}{{ message.content }}{% endif %}{{ '</s>' }}\n"
        "{% if loop.last %}{{ loop.index0 }}{% endif %}{% endfor %}"
    ),
    "alternating": (
        "{{ bos_token }}{% set ns = namespace(turns=0, system='') %}\n"
        "{% for message in messages %}\n"
        "    {% if message.role == 'system' %}\n"
        "        {% if not loop.first %}{{ raise_exception('system must be first') }}{% endif %}\n"
        "        {% set ns.system = message.content + '\\n\\n' %}\n"
        "        {% continue %}\n"
        "    {% endif %}\n"
        "    {% if (message.role == 'user') != (ns.turns % 2 == 0) %}\n"
        "        {{ raise_exception('roles must alternate, got ' ~ message.role) }}\n"
        "    {% endif %}\n"
        "    {% set ns.turns = ns.turns + 1 %}\n"
        "    {% if ns.turns > 3 %}{% break %}{% endif %}\n"
        "[{{ (ns.system if ns.turns == 1 else '') + message.content }}]{{ unk_token }}\n"
        "{% endfor %}"
    ),
    "tools": (
        "{% macro call(c) %}<call>{{ c.function | tojson }}|"
        "{{ c.function.arguments | tojson(indent=2) }}</call>{% endmacro %}\n"
        "{% if tools is not none %}{{ tools | tojson }}{% endif %}"
        "{% if tools is defined and documents is defined %}both{% endif %}"
        "{% for m in messages %}{{ m.role }}: "
        "{% if m.content is string %}{{ m.content }}"
        "{% else %}{{ m.content | tojson(sort_keys=true, separators=(',', ':')) }}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ call(c) }}{% endfor %}"
        "{% if m.reasoning_content is defined %}({{ m.reasoning_content }}){% endif %}"
        "{{ m | tojson(ensure_ascii=true) }}{% if 'tool_calls' in m %}!{% endif %}\n"
        "{% endfor %}{{ pad_token }}{{ bos_token | e }}"
    ),
}  # fmt: skip
CHATS = {"plain": CHAT, "system": [SYSTEM, *CHAT], "tools": TOOLS, "late": [*CHAT[:2], SYSTEM]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tokenizer and its special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = train_bpe(iter(["some text"] * 9), 300)
    (folder / "tokenizer.json").write_bytes(made.files()["tokenizer.json"])
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIALS))
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_render_as_in_transformers(folder, theirs, template, chat):
    ours = ChatTemplate(template, SPECIALS)
    try:
        expected = theirs.apply_chat_template(chat, chat_template=template, tokenize=False)
    except Exception as error:
        with pytest.raises(Rejected) as caught:
            ours.render(chat)
        assert str(error) in caught.value.detail
    else:
        assert ours.render(chat) == expected
    assert chat[0].keys() <= {"role", "content"}  # it was not changed


def test_the_comparison_sees_refusals_and_renderings(theirs):
    """The chats above are refused by some templates and rendered by others."""
    template = ChatTemplate(TEMPLATES["alternating"], SPECIALS)
    for chat, reason in ((CHATS["late"], "system must be first"), (TOOLS, "roles must alternate")):
        with pytest.raises(Rejected, match="chat_refused") as caught:
            template.render(chat)
        assert f"the chat template refuses it: {reason}" in caught.value.detail
    text = ChatTemplate(TEMPLATES["tools"], SPECIALS).render(TOOLS)
    assert '{"name": "less", "arguments": {"b": 2, "a": [1, "é<&>\'"]}}' in text


def test_the_time_is_the_one_it_is_told():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {})
    assert template.render(CHAT, datetime(2031, 2, 3)) == "03 Feb 2031"
    assert template.render(CHAT) == datetime.now().strftime("%d %b %Y")


@pytest.mark.parametrize(
    ("template", "detail"),
    [
        ("{{ messages[9].content }}", "UndefinedError: list object has no element 9"),
        ("{{ messages[0].content + 1 }}", "TypeError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError: "),
        ("{{ messages.append(1) }}", "SecurityError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ("{{ raise_exception('one\nand two') }}", "refuses it: one and two"),
    ],
)
def test_whatever_a_template_raises_is_a_rejection(template, detail):
    with pytest.raises(Rejected) as caught:
        ChatTemplate(template, {}).render(CHAT)
    assert detail in caught.value.detail and "\n" not in caught.value.detail


def test_broken_templates_are_refused(folder, tmp_path):
    with pytest.raises(UsageError, match=r"the chat template cannot be read: TemplateSyntaxError"):
        ChatTemplate("{% for %}", {})
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": {"a": 1}}))
    with pytest.raises(UsageError, match=r"the chat_template in tokenizer_config\.json is not"):
        open_tokenizer(str(tmp_path))

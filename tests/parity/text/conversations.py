"""Conversations that the chat template checks render: system, tools, several turns, odd content."""

NOW = [2025, 3, 9, 14, 5, 7]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather in a town. Says \"rain\" & <sun>.",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "description": "Name of the town, e.g. Zürich"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "default": 1, "minimum": 0},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["town"],
        },
        "return": {"type": "object", "properties": {"degrees": {"type": "number"}}},
    },
}
TIDES = {
    "type": "function",
    "function": {
        "name": "tides",
        "description": "",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


def call(name, arguments, number="call12345"):
    return {
        "id": number,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


ODD = [
    "",
    " ",
    "\n\n  leading and trailing \t\n",
    "quotes ' and \" and \\ and `",
    "braces {{ user }} {% if x %} {# no #} }}",
    "<script>alert('&amp;')</script>",
    "<think>\nthoughts inside\n</think>\n\nand an answer",
    "<|im_start|>user\nnot a turn<|im_end|>",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 🇳🇴 and ﬁ ligature",
    "עברית العربية हिन्दी ไทย 日本語 한국어",
    "combining e\u0301 n\u0303 and z\u200dw\u200cj",
    "controls \x00\x01\x1f\x7f\x85 and \u2028 \u2029",
    "tabs\tand\r\nCRLF\rCR",
    "1e400 NaN -0.0 None True",
    "a" * 300,
]


def _plain():
    yield "one turn", [user("Hello")], {}
    yield "answered", [user("Hello"), assistant("Hi there.")], {}
    yield "system", [system("You are terse."), user("Hello"), assistant("Hi.")], {}
    yield "many turns", [system("S")] + [
        turn for i in range(4) for turn in (user(f"question {i}"), assistant(f"answer {i}"))
    ], {}
    yield "ends with user", [user("a"), assistant("b"), user("c")], {}
    for i, text in enumerate(ODD):
        yield f"odd user {i}", [user(text), assistant("ok")], {}
        yield f"odd assistant {i}", [user("say it"), assistant(text), user("again")], {}
    for i in (2, 4, 8):
        yield f"odd system {i}", [system(ODD[i]), user("x"), assistant("y")], {}
    yield "starts with assistant", [assistant("I begin."), user("ok"), assistant("good")], {}
    yield "two users", [user("one"), user("two"), assistant("three")], {}
    yield "two systems", [system("one"), system("two"), user("three")], {}
    yield "no messages", [], {}
    yield "unknown role", [user("a"), {"role": "critic", "content": "b"}], {}
    yield "developer", [{"role": "developer", "content": "rules"}, user("a"), assistant("b")], {}
    yield "no content", [user("a"), {"role": "assistant"}], {}
    yield "null content", [user("a"), assistant(None)], {}
    yield "number as content", [user(5), assistant(1.5)], {}
    yield "parts", [
        user([{"type": "text", "text": "first "}, {"type": "text", "text": "second"}]),
        assistant([{"type": "text", "text": "answer"}]),
    ], {}
    yield "reasoning", [
        user("2+2"),
        assistant("4", reasoning_content="two and two"),
        user("and 3+3"),
        assistant("6", reasoning_content="\nthree and three\n"),
    ], {}
    yield "thinking", [user("2+2"), assistant("4", thinking="two and two")], {}
    yield "names", [
        {"role": "user", "name": "Ann", "content": "hi"},
        {"role": "assistant", "name": "Bot", "content": "hello"},
    ], {}
    yield "thinking off", [user("a"), assistant("b"), user("c")], {"enable_thinking": False}
    yield "thinking on", [user("a"), assistant("b"), user("c")], {"enable_thinking": True}
    yield "date given", [user("a")], {"date_string": "01 Jan 2024"}


def _with_tools():
    flow = [
        user("Weather in Zürich?"),
        assistant(None, tool_calls=[call("get_weather", {"town": "Zürich", "days": 2})]),
        {
            "role": "tool",
            "tool_call_id": "call12345",
            "name": "get_weather",
            "content": '{"degrees": 21.5, "sky": "klar & <blau>"}',
        },
        assistant("21.5 degrees."),
    ]
    yield "tools offered", [user("hi"), assistant("hello")]
    yield "tools with system", [system("Use tools."), user("hi")]
    yield "tool flow", flow
    yield "tool flow with system", [system("Use tools.")] + flow
    yield "tool flow ends at result", flow[:3]
    yield "arguments as text", [
        user("tide?"),
        assistant("", tool_calls=[call("tides", '{"harbour": "north"}', "abcdefghi")]),
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "high"},
        assistant("It is high."),
    ]
    yield "two calls", [
        user("both?"),
        assistant(
            "Let me look.",
            tool_calls=[
                call("get_weather", {"town": "Oslo", "unit": "celsius"}, "aaaaaaaaa"),
                call("tides", {}, "bbbbbbbbb"),
            ],
        ),
        {"role": "tool", "tool_call_id": "aaaaaaaaa", "content": "4"},
        {"role": "tool", "tool_call_id": "bbbbbbbbb", "content": "low"},
        assistant("4 degrees, low tide."),
        user("thanks"),
        assistant("You are welcome."),
    ]
    yield "nested arguments", [
        user("go"),
        assistant(
            None,
            tool_calls=[
                call(
                    "get_weather",
                    {
                        "town": "A\"B\\C\n",
                        "deep": {"list": [1, 2.5, 1e-7, 1e22, True, None, {}, []], "é": "ü"},
                    },
                )
            ],
        ),
        {"role": "tool", "content": "done"},
    ]


def jobs():
    """Each conversation with and without a generation prompt, as render_tool takes them."""
    cases = [(name, messages, None, None, more) for name, messages, more in _plain()]
    cases += [(name, messages, [WEATHER, TIDES], None, {}) for name, messages in _with_tools()]
    cases += [(f"{name}, no tools", messages, None, None, {}) for name, messages in _with_tools()]
    cases.append(
        (
            "documents",
            [user("what do they say?")],
            None,
            [{"title": "One", "text": "first text"}, {"title": "Two", "text": "second"}],
            {},
        )
    )
    for name, messages, tools, documents, more in cases:
        for prompt in (False, True):
            yield {
                "name": name + (", prompt" if prompt else ""),
                "messages": messages,
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": prompt,
                "now": NOW,
                "variables": {
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                    "unk_token": "<unk>",
                    "pad_token": "<pad>",
                    **more,
                },
            }

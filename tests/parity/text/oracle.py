"""Chat templates through jinja2, set up as Transformers sets it up.

render(template, job) -> (text, spans): spans are the byte ranges of {% generation %} blocks.
Needs jinja2 only.
"""

import datetime
import json

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Private-use characters that mark a generation block in the output.
BEGIN, END = "\U0010fff0", "\U0010fff1"


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = lambda text: nodes.Output([nodes.TemplateData(text)], lineno=line)
        return [mark(BEGIN), nodes.Scope(body, lineno=line), mark(END)]


def environment(now):
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime(*now).strftime(form)
    return env


def normalize(message):
    """What Transformers does to a message before a template sees it."""
    message = {key: value for key, value in message.items() if value is not None}
    for key in ("reasoning_content", "thinking", "reasoning"):
        if key in message:
            reasoning = message[key]
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def split_marks(marked):
    text, spans, begin = [], [], 0
    length = 0
    for part in marked.replace(END, BEGIN).split(BEGIN):
        text.append(part)
        length += len(part.encode())
        spans.append(length)
    ends = spans[:-1]
    return "".join(text), [list(pair) for pair in zip(ends[0::2], ends[1::2])]


def render(template, job):
    compiled = environment(job["now"]).from_string(template)
    variables = {
        "messages": [normalize(message) for message in job["messages"]],
        "tools": job["tools"],
        "documents": job["documents"],
        "add_generation_prompt": job["add_generation_prompt"],
    }
    variables.update(job["variables"])
    return split_marks(compiled.render(**variables))

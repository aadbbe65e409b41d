"""Chat templates through the tokenizers' apply_chat_template of the Transformers that is installed.

Oracle().render(template, job) -> (text, spans), as oracle.py has it. Needs Transformers.
"""

import datetime
import pathlib


class Clock(datetime.datetime):
    """What `strftime_now` asks for the time."""

    fixed = None

    @classmethod
    def now(cls, tz=None):
        return cls.fixed


def byte_spans(text, spans):
    return [[len(text[:index].encode()) for index in span] for span in spans]


class Oracle:
    def __init__(self):
        from transformers import PreTrainedTokenizerFast
        from transformers.utils import chat_template_utils

        self.utils = chat_template_utils
        self.utils.datetime = Clock
        path = pathlib.Path(__file__).parent / "tokenizer.json"
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))

    def render(self, template, job):
        Clock.fixed = datetime.datetime(*job["now"])
        same = {
            "tools": job["tools"],
            "documents": job["documents"],
            "chat_template": template,
            "add_generation_prompt": job["add_generation_prompt"],
            **job["variables"],
        }
        text = self.tokenizer.apply_chat_template(job["messages"], tokenize=False, **same)
        if "endgeneration" not in template:
            return text, []
        # As apply_chat_template does before it calls this.
        messages = [
            {key: value for key, value in message.items() if value is not None}
            for message in job["messages"]
        ]
        marked, spans = self.utils.render_jinja_template(
            conversations=[messages], return_assistant_tokens_mask=True, **same
        )
        assert marked == [text]
        return text, byte_spans(text, spans[0])

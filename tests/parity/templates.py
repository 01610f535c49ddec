"""The two generations of chat template that published checkpoints carry, in our own words.

Both put all images of a message first, then all videos, then the texts. ``space`` ends the role
with a blank and begins each text with a line break; ``newline`` ends the role, every placeholder
and every message with one. The ``generation`` blocks mark what the assistant says, for training.
"""

_SPACE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}\
{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}\
{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>' }}{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}\
{% if message['role'] == 'assistant' %}\
{% generation %}{{ '\\n' + part['text'] }}{% endgeneration %}\
{% else %}{{ '\\n' + part['text'] }}{% endif %}{% endfor %}\
{{ '<|im_end|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_NEWLINE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}\
{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>\\n' }}{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}\
{% if message['role'] == 'assistant' %}\
{% generation %}{{ part['text'] }}{% endgeneration %}\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}\
{{ '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES = {"space": _SPACE, "newline": _NEWLINE}

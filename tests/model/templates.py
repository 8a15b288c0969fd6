"""Short chat templates in the manner of well-known models': what they add, strip, refuse and rewrite, in a
few lines each."""

from __future__ import annotations

ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CALLS = (
    '{% for c in m.tool_calls %}{{ \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' + '
    "c.function.arguments|tojson"
    " + '}\n</tool_call>' }}{% endfor %}"
)
TOOLS = "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools|tojson + '<|im_end|>\n' }}{% endif %}"
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
QWEN25 = (  # a system turn of its own, tools, tool calls
    TOOLS + "{% if not tools and messages[0].role != 'system' %}{{ '<|im_start|>system\nbe kind<|im_end|>\n' "
    "}}{% endif %}"
    + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if m.tool_calls %}"
    + CALLS
    + "{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASK
)
QWEN3 = (  # reasoning is shown in the last turn only, and then always, empty or not
    "{% for m in messages %}{% set c = m.content %}{% set r = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in c %}{% set r = "
    "c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + r + "
    "'\n</think>\n\n' }}{% endif %}"
    "{{ c + '<|im_end|>\n' }}{% endfor %}" + ASK
)
LLAMA3 = (  # a date, stripped contents; a tool call's turn shows nothing but the call
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + (strftime_now('%d %b %Y') "
    "if strftime_now is defined else '26 Jul 2024') }}"
    "{{ '\n\n' + (messages[0].content|trim if messages[0].role == 'system' else '') + '<|eot_id|>' }}"
    "{% for m in messages %}{% if m.tool_calls %}{{ "
    '\'<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "\' + m.tool_calls[0].function.name'
    " + '\", \"parameters\": ' + m.tool_calls[0].function.arguments|tojson + '}<|eot_id|>' }}"
    "{% elif not (loop.first and m.role == 'system') %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim + '<|eot_id|>' }}{% endif "
    "%}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_FIRST = (  # the first release asked for an answer always
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim + "
    "'<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
MISTRAL = (  # no header of an answer, strict turns, the system turn inside the first question
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set "
    "messages = messages[1:] %}{% else %}{% set s = '' %}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ "
    "raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (s if loop.first else '') + m.content + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content|trim + "
    "'<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}{{ '\n' }}{% if loop.last "
    "and add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% endif %}{% endfor %}"
)
PHI3 = (  # the end of text stands behind the last turn, unless an answer is asked for
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# earlier reasoning is cut away, and the header of an answer opens a new one; a call's arguments are pasted as
# text
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif "
    "m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] }}{% for c in m.tool_calls or [] %}{{ '<|tool|>' + "
    "c.function.name + '\n' + c.function.arguments }}"
    "{% endfor %}{{ '<|eos|>' }}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt "
    "%}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
POLITE = (  # asks behind a user's turn only
    "{% for m in messages %}"
    + TURN
    + "{% endfor %}{% if add_generation_prompt and messages[-1].role == 'user' %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)
BARE = "{% for m in messages %}" + TURN + "{% endfor %}"  # never asks
NAMED = (  # names its speakers, and asks without a name
    "{% for m in messages %}{{ '<|im_start|>' + m.role + (' Ann' if m.role == 'assistant' else '') + '\n' + "
    "m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
STRICT = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('who asks?') }}{% endif %}" + CHATML
COUNTED = "{{ messages|length ~ ' turns\n' }}" + CHATML
WORDS = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content }}{{ eos_token if loop.last and m.role == "
    "'assistant' else '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
GRANITE = (  # a default system turn with the date
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system<|im_end|>Today is ' + strftime_now('%B %d, "
    "%Y') + '.</s>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_end|>' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>' }}{% endif %}"
)
GPT_OSS = (  # the last turn ends with a token of its own; answers of tools repeat the name of the call
    "{% for m in messages %}{% if m.tool_calls %}"
    "{{ '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|message|>' + "
    "m.tool_calls[0].function.arguments|tojson + '<|call|>' }}"
    "{% else %}{% if m.role == 'tool' %}{{ '<|start|>' + messages[loop.index0 - "
    "1].tool_calls[0].function.name + '<|message|>' + m.content }}"
    "{% else %}{{ '<|start|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '') + "
    "'<|message|>' + m.content }}{% endif %}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
SMOL3 = (  # marks by itself what an assistant generates
    "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}{% for m in messages "
    "%}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% "
    "else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
SPECIAL = [
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|end|>",
    ),
    *(
        "<|User|>",
        "<|Assistant|>",
        "<|eos|>",
        "<|start|>",
        "<|message|>",
        "<|channel|>",
        "<|call|>",
        "<|return|>",
    ),
]

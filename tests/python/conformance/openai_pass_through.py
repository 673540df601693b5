"""OpenAI's own client against Andon: completions and responses, which are passed
through to a provider.

    python openai_pass_through.py --http 127.0.0.1:8000

The server must have the model `big`, of a provider that responds to everything
with "Good day", three tokens read and two written.
"""

import openai

from checks import CALL_SECONDS_MAX, Checks, arguments, expect

TEXT = "Good day"


def check_completions(checks, client):
    """A text, whole and in parts."""
    with checks.check("completion"):
        answer = client.completions.create(model="big", prompt="hello")
        expect(answer.choices[0].text == TEXT, f"it is {answer}")
        expect(answer.usage.total_tokens == 5, f"the usage is {answer.usage}")
    with checks.check("completion_stream"):
        chunks = list(client.completions.create(
            model="big", prompt="hello", stream=True, stream_options={"include_usage": True}
        ))
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        expect(text == TEXT, f"it is {chunks}")
        expect(chunks[-1].usage.total_tokens == 5, f"the last is {chunks[-1]}")


def check_responses(checks, client):
    """A response, whole and in parts."""
    with checks.check("response"):
        answer = client.responses.create(model="big", input="hello")
        expect(answer.output_text == TEXT, f"it is {answer}")
        expect(answer.usage.input_tokens == 3, f"the usage is {answer.usage}")
    with checks.check("response_stream"):
        events = list(client.responses.create(model="big", input="hello", stream=True))
        kinds = [event.type for event in events]
        expect(kinds[0] == "response.created" and kinds[-1] == "response.completed", f"they are {kinds}")
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        expect(text == TEXT == events[-1].response.output_text, f"they are {events}")


def main():
    parser = arguments(__doc__.splitlines()[0], ("http",))
    options = parser.parse_args()
    client = openai.OpenAI(
        base_url=f"http://{options.http}/v1", api_key="unused", max_retries=0, timeout=CALL_SECONDS_MAX
    )
    checks = Checks()
    check_completions(checks, client)
    check_responses(checks, client)
    checks.finish()


if __name__ == "__main__":
    main()

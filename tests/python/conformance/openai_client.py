"""OpenAI's own client against Andon: embeddings, models and errors.

    python openai_client.py --http 127.0.0.1:8000
    python openai_client.py --http 127.0.0.1:8000 --key-file KEY --spent-key-file KEY

The server must serve `minilm` and `digits`. With keys the server must ask for
them: the first key's tenant may call `minilm` alone, and the second's one
request a minute or fewer.
"""

import base64
import json
import urllib.request

import numpy as np
import openai

from checks import CALL_SECONDS_MAX, Checks, arguments, expect, read_key

TEXTS = [
    "The harbour was quiet before the first ferry left.",
    "提灯が静かに揺れている。",
    "Quarterly revenue rose by four percent.",
]
TOKENS = [101, 7592, 102]


def client_of(options, key):
    return openai.OpenAI(
        base_url=f"http://{options.http}/v1", api_key=key, max_retries=0, timeout=CALL_SECONDS_MAX
    )


def vectors(answer):
    """The embeddings of an answer as an array of 32-bit numbers."""
    return np.array([entry.embedding for entry in answer.data], dtype=np.float32)


def expect_error(call, kind, **fields):
    """Runs `call`, which must raise this class of the SDK with these fields."""
    try:
        call()
    except openai.APIStatusError as error:
        expect(type(error) is kind, f"it is {type(error).__name__}, expected {kind.__name__}: {error}")
        for name, expected in fields.items():
            found = getattr(error, name)
            expect(found == expected, f"{name} is {found!r}, expected {expected!r}: {error}")
        expect(isinstance(error.body, dict), f"the body is {error.body!r}")
        expect({"message", "type", "param", "code"} <= set(error.body), f"it is {error.body}")
        expect(error.body["message"], "the error has no message")
        return error
    raise AssertionError("the call succeeded")


def check_models(checks, client):
    """What may be called."""
    with checks.check("models_list"):
        models = client.models.list().data
        names = [model.id for model in models]
        expect({"minilm", "digits"} <= set(names), f"the models are {names}")
        expect(all(model.object == "model" for model in models), f"they are {models}")
        expect(all(isinstance(model.created, int) for model in models), f"they are {models}")
    with checks.check("models_retrieve"):
        expect(client.models.retrieve("minilm").id == "minilm", "it is another")
        expect_error(lambda: client.models.retrieve("nobody"), openai.NotFoundError, status_code=404)


def check_embeddings(checks, client, options):
    """Every form of input and output."""
    with checks.check("default_is_base64"):
        answer = client.embeddings.create(model="minilm", input=TEXTS)
        found = vectors(answer)
        expect(found.shape == (3, 384), f"the shape is {found.shape}")
        expect(np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-4), "they are not unit vectors")
        expect([entry.index for entry in answer.data] == [0, 1, 2], "the order is another")
        expect(answer.model == "minilm" and answer.object == "list", f"it is {answer.model}")
        expect(answer.usage.prompt_tokens == answer.usage.total_tokens > 0, f"{answer.usage}")
    with checks.check("base64_is_little_endian"):
        body = json.dumps({"model": "minilm", "input": TEXTS[0], "encoding_format": "base64"})
        request = urllib.request.Request(
            f"http://{options.http}/v1/embeddings", body.encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=CALL_SECONDS_MAX) as response:
            text = json.load(response)["data"][0]["embedding"]
        expect(isinstance(text, str), "the embedding is no text")
        found = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
        expected = vectors(client.embeddings.create(model="minilm", input=TEXTS[0]))[0]
        expect(found.tobytes() == expected.tobytes(), "the bytes differ")
    with checks.check("float_has_the_same_bits"):
        floats = client.embeddings.create(model="minilm", input=TEXTS, encoding_format="float")
        coded = client.embeddings.create(model="minilm", input=TEXTS)
        expect(vectors(floats).tobytes() == vectors(coded).tobytes(), "the vectors differ")
    with checks.check("one_text"):
        one = client.embeddings.create(model="minilm", input=TEXTS[0])
        listed = client.embeddings.create(model="minilm", input=[TEXTS[0]])
        expect(vectors(one).shape == (1, 384), f"the shape is {vectors(one).shape}")
        expect(vectors(one).tobytes() == vectors(listed).tobytes(), "the vectors differ")
    with checks.check("dimensions"):
        short = vectors(client.embeddings.create(model="minilm", input=TEXTS, dimensions=128))
        whole = vectors(client.embeddings.create(model="minilm", input=TEXTS))[:, :128]
        whole /= np.linalg.norm(whole, axis=1, keepdims=True)
        expect(short.shape == (3, 128), f"the shape is {short.shape}")
        expect(np.allclose(short, whole, atol=1e-5), "they are not the leading dimensions")
    with checks.check("tokens"):
        one = vectors(client.embeddings.create(model="minilm", input=TOKENS))
        text = vectors(client.embeddings.create(model="minilm", input="hello"))
        expect(one.shape == (1, 384), f"the shape is {one.shape}")
        expect(np.allclose(one, text, atol=1e-5), "the tokens of hello are not hello")
        many = vectors(client.embeddings.create(model="minilm", input=[TOKENS, [101, 2088, 102]]))
        expect(many.shape == (2, 384), f"the shape is {many.shape}")
        expect(np.allclose(many[0], one[0], atol=1e-5), "lists of tokens are mixed up")
    with checks.check("user_is_accepted"):
        client.embeddings.create(model="minilm", input=TEXTS[0], user="someone")
    with checks.check("request_id"):
        raw = client.embeddings.with_raw_response.create(
            model="minilm", input=TEXTS[0], extra_headers={"x-request-id": "lantern-7"}
        )
        found = raw.headers.get("x-request-id")
        expect(found == "lantern-7", f"x-request-id is {found}")


def check_errors(checks, client):
    """Refusals become the SDK's own exceptions."""
    create = client.embeddings.create
    bad = openai.BadRequestError
    cases = [
        ("dimensions_too_many", {"dimensions": 100_000}, "dimensions"),
        ("dimensions_none", {"dimensions": 0}, "dimensions"),
        ("format_unknown", {"encoding_format": "hex"}, "encoding_format"),
        ("input_empty", {"input": []}, "input"),
        ("input_null", {"input": None}, "input"),
        ("input_is_a_number", {"input": 7}, "input"),
        ("input_holds_a_number", {"input": ["x", 7]}, "input[1]"),
        ("model_is_a_number", {"model": 7}, "model"),
        ("prompt_unknown", {"extra_body": {"prompt_name": "nobody"}}, "prompt_name"),
    ]
    for name, change, param in cases:
        with checks.check(name):
            arguments_ = {"model": "minilm", "input": "x", **change}
            error = expect_error(lambda: create(**arguments_), bad, status_code=400, param=param)
            expect(error.type == "invalid_request_error", f"type is {error.type}")
    with checks.check("model_unknown"):
        error = expect_error(
            lambda: create(model="nobody", input="x"), openai.NotFoundError, status_code=404
        )
        expect(error.code == "model_not_found" and "nobody" in str(error), f"it is {error.body}")
    with checks.check("model_does_not_embed"):
        expect_error(lambda: create(model="digits", input="x"), bad, param="model")


def check_identity(checks, options):
    """Keys, what they may do and how much."""
    key, spent = read_key(options.key_file), read_key(options.spent_key_file)
    with checks.check("good_key"):
        client = client_of(options, key)
        expect(len(client.embeddings.create(model="minilm", input="x").data) == 1, "no vector")
        names = [model.id for model in client.models.list().data]
        expect(names == ["minilm"], f"it is shown {names}")
    with checks.check("wrong_key"):
        for wrong in ("wrong", f"{key[:-1]}{'B' if key.endswith('A') else 'A'}"):
            create = client_of(options, wrong).embeddings.create
            error = expect_error(
                lambda: create(model="minilm", input="x"), openai.AuthenticationError, status_code=401
            )
            expect(wrong not in str(error), "the message repeats the key")
            expect(error.response.headers.get("www-authenticate"), "it does not say how to authenticate")
    with checks.check("model_of_others"):
        create = client_of(options, key).embeddings.create
        expect_error(
            lambda: create(model="digits", input="x"), openai.PermissionDeniedError, status_code=403
        )
    with checks.check("quota_spent"):
        create = client_of(options, spent).embeddings.create
        create(model="minilm", input="x")
        error = expect_error(
            lambda: [create(model="minilm", input="x") for _ in range(5)],
            openai.RateLimitError, status_code=429,
        )
        expect(int(error.response.headers.get("retry-after", 0)) > 0, "Retry-After is missing")
        expect(error.code == "rate_limit_exceeded", f"code is {error.code}")


def main():
    parser = arguments(__doc__.splitlines()[0], ("http",))
    parser.add_argument("--key-file", help="a key of a tenant that may call minilm alone")
    parser.add_argument("--spent-key-file", help="a key of a tenant with one request a minute")
    options = parser.parse_args()
    checks = Checks()
    if options.key_file:
        check_identity(checks, options)
    else:
        client = client_of(options, "unused")
        check_models(checks, client)
        check_embeddings(checks, client, options)
        check_errors(checks, client)
    checks.finish()


if __name__ == "__main__":
    main()

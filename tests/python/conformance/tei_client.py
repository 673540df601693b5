"""tei.v1 as a caller sees it who has nothing but the server's reflection.

    python tei_client.py --grpc 127.0.0.1:8001 [--classifier NAME] [--reranker NAME]

The server must serve `minilm`. The names of a classifier and of a reranker, if
it serves such, turn on the checks of Predict and Rerank.
"""

import math

import grpc
import numpy as np

from checks import (
    CALL_SECONDS_MAX,
    Checks,
    Reflected,
    arguments,
    expect,
    expect_status,
    open_channel,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
CANNOT = (INVALID, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)

NUMBER_HEADERS = [
    "x-compute-time",
    "x-compute-characters",
    "x-compute-tokens",
    "x-total-time",
    "x-tokenization-time",
    "x-queue-time",
    "x-inference-time",
]

TEXTS = [
    "A lantern.",
    "The night train left the station eleven minutes late.",
    "Who repaired the stone bridge after the flood?",
    "Soup.",
    "Rain fell on the market until the stalls closed one after another.",
    "提灯が静かに揺れている。",
    "Numbers such as 3, 14 and 159 are in this text.",
    "The committee postponed its decision for the third time this year.",
    "🙂",
    "A short one to end with.",
]


class Tei:
    """Calls of tei.v1 by service and method, with the model in the metadata."""

    def __init__(self, channel):
        self.reflected = Reflected(channel)

    def message(self, name, **fields):
        return self.reflected.message(f"tei.v1.{name}")(**fields)

    def call(self, path, request, model=None, version=None):
        """Calls "Embed/Embed"; a list is sent as a stream and a streamed
        response is returned as a list."""
        return self.call_with_headers(path, request, model, version)[0]

    def call_with_headers(self, path, request, model=None, version=None):
        """As `call`, with the response's initial metadata."""
        service, method = path.split("/")
        metadata = [("andon-model", model)] if model else []
        metadata += [("andon-model-version", version)] if version else []
        options = {"timeout": CALL_SECONDS_MAX, "metadata": metadata}
        callable_ = self.reflected.method(f"tei.v1.{service}", method)
        if isinstance(callable_, grpc.StreamStreamMultiCallable):
            call = callable_(iter(request), **options)
            return list(call), dict(call.initial_metadata())
        if isinstance(callable_, grpc.StreamUnaryMultiCallable):
            request = iter(request)
        response, call = callable_.with_call(request, **options)
        return response, dict(call.initial_metadata())

    def embed(self, text, model="minilm", **fields):
        request = self.message("EmbedRequest", inputs=text, **fields)
        return np.array(self.call("Embed/Embed", request, model).embeddings, dtype=np.float32)

    def tokens(self, text, **fields):
        request = self.message("EncodeRequest", inputs=text, **fields)
        return self.call("Tokenize/Tokenize", request, "minilm").tokens


def expect_headers(headers):
    """The headers of Text Embeddings Inference are there and are numbers."""
    expect(headers.get("x-compute-type"), f"no x-compute-type among {sorted(headers)}")
    for name in NUMBER_HEADERS:
        expect(name in headers, f"no {name} among {sorted(headers)}")
        try:
            value = float(headers[name])
        except ValueError:
            raise AssertionError(f"{name} is {headers[name]!r}, no number") from None
        expect(math.isfinite(value) and value >= 0, f"{name} is {value}")


def expect_near(found, expected, what, tolerance=1e-5):
    """Two vectors are the same but for rounding."""
    expect(found.shape == expected.shape, f"{what}: {found.shape}, expected {expected.shape}")
    difference = float(np.abs(found - expected).max())
    expect(difference <= tolerance, f"{what} differ by {difference}")


def check_info(checks, tei):
    with checks.check("info"):
        info = tei.call("Info/Info", tei.message("InfoRequest"), "minilm")
        expect(info.version, "version is empty")
        expect(info.model_id == "minilm", f"model_id is {info.model_id!r}")
        expect(info.model_type == 0, f"model_type is {info.model_type}, expected EMBEDDING")
        # By itself a model takes bfloat16 where the processor multiplies it.
        expect(info.model_dtype in ("float32", "bfloat16"), f"model_dtype is {info.model_dtype!r}")
        expect(info.max_input_length == 256, f"max_input_length is {info.max_input_length}")
        for name in ("max_concurrent_requests", "max_batch_tokens", "max_client_batch_size",
                     "tokenization_workers"):
            expect(getattr(info, name) > 0, f"{name} is 0")
    with checks.check("model_selection"):
        # minilm is the only model here that embeds, so it need not be named.
        expect_near(tei.embed("a", model=None), tei.embed("a"), "named and unnamed")
        request = tei.message("EmbedRequest", inputs="a")
        tei.call("Embed/Embed", request, "minilm", "1")
        refuse = lambda: tei.call("Embed/Embed", request, "minilm", "99")
        expect_status(refuse, grpc.StatusCode.NOT_FOUND)
        refuse = lambda: tei.call("Embed/Embed", request, "nobody")
        error = expect_status(refuse, grpc.StatusCode.NOT_FOUND)
        expect("nobody" in error.details(), f"it does not name it: {error.details()!r}")
    with checks.check("model_that_cannot_embed"):
        refuse = lambda: tei.embed("a", model="digits")
        error = expect_status(refuse, *CANNOT, grpc.StatusCode.NOT_FOUND)
        # The models that can may be other tenants': they are not named.
        expect("minilm" not in error.details(), f"it names others: {error.details()!r}")


def check_embed(checks, tei):
    with checks.check("embed"):
        text = TEXTS[1]
        request = tei.message("EmbedRequest", inputs=text, normalize=True)
        response, headers = tei.call_with_headers("Embed/Embed", request, "minilm")
        expect(len(response.embeddings) == 384, f"{len(response.embeddings)} dimensions")
        expect_headers(headers)
        metadata = response.metadata
        tokens = len(tei.tokens(text, add_special_tokens=True))
        expect(metadata.compute_chars == len(text), f"compute_chars {metadata.compute_chars}")
        expect(metadata.compute_tokens == tokens, f"{metadata.compute_tokens} of {tokens} tokens")
        expect(metadata.total_time_ns >= metadata.inference_time_ns > 0, f"times: {metadata}")
        expect(int(headers["x-compute-tokens"]) == tokens, "x-compute-tokens differs")
        expect(int(headers["x-compute-characters"]) == len(text), "x-compute-characters differs")
    with checks.check("embed_normalize"):
        scaled, plain = tei.embed("a lantern", normalize=True), tei.embed("a lantern")
        expect(abs(np.linalg.norm(scaled) - 1) < 1e-4, f"norm {np.linalg.norm(scaled)}")
        expect(abs(np.linalg.norm(plain) - 1) > 0.01, "unset normalize scales too")
        expect_near(plain / np.linalg.norm(plain), scaled, "the directions")
    with checks.check("embed_dimensions"):
        plain = tei.embed("a lantern")[:128]
        short = tei.embed("a lantern", normalize=True, dimensions=128)
        expect_near(short, plain / np.linalg.norm(plain), "128 dimensions")
        expect_near(tei.embed("a lantern", dimensions=128), plain, "128 dimensions, not scaled")
        expect(tei.embed("a lantern", dimensions=384).shape == (384,), "all dimensions")
    with checks.check("embed_truncate"):
        text = "alpha " * 600 + "the lantern went out " * 40
        error = expect_status(lambda: tei.embed(text), INVALID)
        expect("inputs" in error.details(), f"`inputs` is not named: {error.details()!r}")
        right = tei.embed(text, truncate=True)
        left = tei.embed(text, truncate=True, truncation_direction=1)
        expect_near(right, tei.embed("alpha " * 600, truncate=True), "right truncation", 1e-4)
        expect(float(np.abs(left - right).max()) > 1e-3, "left and right truncation agree")
    with checks.check("embed_stream"):
        expected = [tei.embed(text, normalize=True) for text in TEXTS]
        requests = [tei.message("EmbedRequest", inputs=t, normalize=True) for t in TEXTS]
        responses = tei.call("Embed/EmbedStream", requests, "minilm")
        expect(len(responses) == len(TEXTS), f"{len(responses)} responses to {len(TEXTS)} texts")
        for number, (response, vector) in enumerate(zip(responses, expected)):
            found = np.array(response.embeddings, dtype=np.float32)
            expect_near(found, vector, f"response {number} and its unary response")
    with checks.check("embed_stream_empty"):
        expect(tei.call("Embed/EmbedStream", [], "minilm") == [], "responses to nothing")
    with checks.check("embed_sparse"):
        request = tei.message("EmbedSparseRequest", inputs="a")
        refuse = lambda: tei.call("Embed/EmbedSparse", request, "minilm")
        error = expect_status(refuse, grpc.StatusCode.UNIMPLEMENTED)
        expect(len(error.details().split()) >= 4, f"no sentence: {error.details()!r}")
        refuse = lambda: tei.call("Embed/EmbedSparseStream", [request], "minilm")
        expect_status(refuse, grpc.StatusCode.UNIMPLEMENTED)


def check_embed_all(checks, tei):
    def rows(response):
        return np.array([list(token.embeddings) for token in response.token_embeddings])

    with checks.check("embed_all"):
        text = TEXTS[4]
        request = tei.message("EmbedAllRequest", inputs=text)
        response, headers = tei.call_with_headers("Embed/EmbedAll", request, "minilm")
        found, tokens = rows(response), tei.tokens(text, add_special_tokens=True)
        expect(found.shape == (len(tokens), 384), f"the shape is {found.shape}")
        expect_headers(headers)
        # minilm pools by the mean, so the mean of all is its embedding.
        expect_near(found.mean(axis=0), tei.embed(text), "mean of tokens and embedding", 1e-4)
    with checks.check("embed_all_stream"):
        requests = [tei.message("EmbedAllRequest", inputs=text) for text in TEXTS]
        expected = [tei.call("Embed/EmbedAll", request, "minilm") for request in requests]
        responses = tei.call("Embed/EmbedAllStream", requests, "minilm")
        expect(len(responses) == len(TEXTS), f"{len(responses)} responses to {len(TEXTS)} texts")
        for number, (response, one) in enumerate(zip(responses, expected)):
            expect_near(rows(response), rows(one), f"response {number} and its unary response")


def check_tokenize(checks, tei):
    with checks.check("tokenize"):
        text = "what a wonderful lantern"
        tokens = tei.tokens(text, add_special_tokens=True)
        expect(tokens[0].special and tokens[-1].special, "no special tokens at the ends")
        expect(not any(token.special for token in tokens[1:-1]), "too many special tokens")
        plain = tei.tokens(text)
        expect([t.id for t in plain] == [t.id for t in tokens[1:-1]], "the ids differ")
        expect([t.text for t in plain] == text.split(), f"texts {[t.text for t in plain]}")
        spans = [text[token.start : token.stop] for token in plain]
        expect(spans == text.split(), f"start and stop cut {spans}")
    with checks.check("tokenize_counts_characters"):
        text = "提灯 naïve 🙂 café lantern"
        last = tei.tokens(text)[-1]
        found = text[last.start : last.stop]
        expect(found == "lantern", f"{last.start}..{last.stop} is {found!r}, expected lantern")
    with checks.check("decode"):
        text = "the night train left the station eleven minutes late."
        ids = [token.id for token in tei.tokens(text, add_special_tokens=True)]
        decode = lambda skip: tei.call(
            "Tokenize/Decode",
            tei.message("DecodeRequest", ids=ids, skip_special_tokens=skip),
            "minilm",
        ).text
        expect(decode(True) == text, f"decoded {decode(True)!r}")
        expect("[CLS]" in decode(False), f"special tokens are lost: {decode(False)!r}")
    with checks.check("tokenize_stream"):
        requests = [tei.message("EncodeRequest", inputs=text) for text in TEXTS]
        responses = tei.call("Tokenize/TokenizeStream", requests, "minilm")
        found = [[token.id for token in response.tokens] for response in responses]
        expected = [[token.id for token in tei.tokens(text)] for text in TEXTS]
        expect(found == expected, "the stream and the unary calls differ")
    with checks.check("decode_stream"):
        words = ["lantern", "night train", "soup"]
        requests = [
            tei.message("DecodeRequest", ids=[token.id for token in tei.tokens(text)])
            for text in words
        ]
        responses = tei.call("Tokenize/DecodeStream", requests, "minilm")
        expect([a.text for a in responses] == words, f"decoded {[a.text for a in responses]}")


def expect_cannot(tei, path, request, able):
    """minilm cannot do this; the message names it and no other model."""
    error = expect_status(lambda: tei.call(path, request, "minilm"), *CANNOT)
    expect("minilm" in error.details(), f"minilm is not named: {error.details()!r}")
    if able:
        expect(able not in error.details(), f"{able} is named: {error.details()!r}")
    expect(len(error.details().split()) >= 4, f"no sentence: {error.details()!r}")
    if not able:
        nobody = lambda: tei.call(path, request)
        expect_status(nobody, *CANNOT, grpc.StatusCode.NOT_FOUND)


def check_refusals(checks, tei, options):
    predict = tei.message("PredictRequest", inputs="a")
    pair = tei.message("PredictPairRequest", inputs=["a", "b"])
    rerank = tei.message("RerankRequest", query="a", texts=["b", "c"])
    one = tei.message("RerankStreamRequest", query="a", text="b")
    for path, request, able in (
        ("Predict/Predict", predict, options.classifier),
        ("Predict/PredictStream", [predict], options.classifier),
        ("Predict/PredictPair", pair, options.classifier),
        ("Predict/PredictPairStream", [pair], options.classifier),
        ("Rerank/Rerank", rerank, options.reranker),
        ("Rerank/RerankStream", [one], options.reranker),
    ):
        with checks.check(f"refused_{path.split('/')[1]}"):
            expect_cannot(tei, path, request, able)


def predictions(response):
    """(label, score) pairs of one response."""
    return [(entry.label, entry.score) for entry in response.predictions]


def expect_same_predictions(found, expected):
    labels = [label for label, _ in expected]
    expect([label for label, _ in found] == labels, f"{found}, expected {expected}")
    scores = np.array([[a[1], b[1]] for a, b in zip(found, expected)])
    expect(np.allclose(scores[:, 0], scores[:, 1], atol=1e-4), f"{found}, expected {expected}")


def check_predict(checks, tei, model):
    with checks.check("predict_info"):
        info = tei.call("Info/Info", tei.message("InfoRequest"), model)
        expect(info.model_type == 1, f"model_type is {info.model_type}, expected CLASSIFIER")
    with checks.check("predict"):
        request = tei.message("PredictRequest", inputs=TEXTS[1])
        response, headers = tei.call_with_headers("Predict/Predict", request, model)
        expect_headers(headers)
        found = predictions(response)
        scores = [score for _, score in found]
        expect(len(found) > 0 and all(label for label, _ in found), f"predictions {found}")
        expect(len({label for label, _ in found}) == len(found), f"labels repeat: {found}")
        expect(scores == sorted(scores, reverse=True), f"not the best first: {scores}")
        expect(all(0 <= score <= 1 for score in scores), f"no probabilities: {scores}")
        if len(scores) > 1:
            expect(abs(sum(scores) - 1) < 1e-4, f"probabilities sum to {sum(scores)}")
    with checks.check("predict_raw_scores"):
        request = tei.message("PredictRequest", inputs=TEXTS[1], raw_scores=True)
        raw = predictions(tei.call("Predict/Predict", request, model))
        expect([label for label, _ in raw] == [label for label, _ in found], f"order: {raw}")
        if len(raw) > 1:
            powers = np.exp([score for _, score in raw])
            expect(np.allclose(powers / powers.sum(), scores, atol=1e-4), "not its softmax")
    with checks.check("predict_stream"):
        requests = [tei.message("PredictRequest", inputs=text) for text in TEXTS]
        responses = tei.call("Predict/PredictStream", requests, model)
        expect(len(responses) == len(TEXTS), f"{len(responses)} responses to {len(TEXTS)} texts")
        for request, response in zip(requests, responses):
            expected = tei.call("Predict/Predict", request, model)
            expect_same_predictions(predictions(response), predictions(expected))
    with checks.check("predict_pair"):
        pairs = [
            tei.message("PredictPairRequest", inputs=[TEXTS[1], text], truncate=True)
            for text in TEXTS[2:6]
        ]
        expected = [predictions(tei.call("Predict/PredictPair", pair, model)) for pair in pairs]
        expect(all(len(entry) == len(found) for entry in expected), f"predictions {expected}")
        responses = tei.call("Predict/PredictPairStream", pairs, model)
        expect(len(responses) == len(pairs), f"{len(responses)} responses to {len(pairs)} pairs")
        for response, entry in zip(responses, expected):
            expect_same_predictions(predictions(response), entry)
    with checks.check("predict_pair_needs_two"):
        for texts in ([], ["a"], ["a", "b", "c"]):
            request = tei.message("PredictPairRequest", inputs=texts)
            refuse = lambda: tei.call("Predict/PredictPair", request, model)
            error = expect_status(refuse, INVALID)
            expect("inputs" in error.details(), f"`inputs` is not named: {error.details()!r}")


def ranks(response):
    """(index, score) of each rank."""
    return [(rank.index, rank.score) for rank in response.ranks]


def check_rerank(checks, tei, model):
    query, texts = "Who repaired the stone bridge?", TEXTS[:8]
    base = {"query": query, "texts": texts}
    with checks.check("rerank_info"):
        info = tei.call("Info/Info", tei.message("InfoRequest"), model)
        expect(info.model_type == 2, f"model_type is {info.model_type}, expected RERANKER")
    with checks.check("rerank"):
        request = tei.message("RerankRequest", **base)
        response, headers = tei.call_with_headers("Rerank/Rerank", request, model)
        expect_headers(headers)
        found = ranks(response)
        scores = [score for _, score in found]
        expect(sorted(index for index, _ in found) == list(range(8)), f"indexes: {found}")
        expect(scores == sorted(scores, reverse=True), f"not the best first: {scores}")
        expect(all(0 <= score <= 1 for score in scores), f"no probabilities: {scores}")
        expect(not any(rank.HasField("text") for rank in response.ranks), "texts came unasked")
    with checks.check("rerank_return_text"):
        request = tei.message("RerankRequest", return_text=True, **base)
        for rank in tei.call("Rerank/Rerank", request, model).ranks:
            expect(rank.text == texts[rank.index], f"{rank.index} came with {rank.text!r}")
    with checks.check("rerank_raw_scores"):
        request = tei.message("RerankRequest", raw_scores=True, **base)
        raw = [score for _, score in ranks(tei.call("Rerank/Rerank", request, model))]
        expect(raw == sorted(raw, reverse=True), f"not the best first: {raw}")
        sigmoid = 1 / (1 + np.exp(-np.array(raw)))
        expect(np.allclose(sigmoid, scores, atol=1e-4), "probabilities are not their sigmoid")
    with checks.check("rerank_stream"):
        requests = [
            tei.message("RerankStreamRequest", query=query, text=text, return_text=True)
            for text in texts
        ]
        response = tei.call("Rerank/RerankStream", requests, model)
        streamed = np.array([score for _, score in ranks(response)])
        expect(np.allclose(streamed, scores, atol=1e-4), f"{streamed}, expected {scores}")
        for rank in response.ranks:
            expect(rank.text == texts[rank.index], f"{rank.index} came with {rank.text!r}")
    with checks.check("rerank_bad"):
        empty = tei.message("RerankRequest", query=query, texts=[])
        error = expect_status(lambda: tei.call("Rerank/Rerank", empty, model), INVALID)
        expect("texts" in error.details(), f"`texts` is not named: {error.details()!r}")
        mixed = [
            tei.message("RerankStreamRequest", query=text, text=text) for text in texts[:2]
        ]
        refuse = lambda: tei.call("Rerank/RerankStream", mixed, model)
        error = expect_status(refuse, INVALID)
        expect("query" in error.details(), f"`query` is not named: {error.details()!r}")


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--classifier", metavar="NAME", help="a model for Predict")
    parser.add_argument("--reranker", metavar="NAME", help="a model for Rerank")
    options = parser.parse_args()
    channel, checks = open_channel(options.grpc), Checks()
    tei = Tei(channel)
    check_info(checks, tei)
    check_embed(checks, tei)
    check_embed_all(checks, tei)
    check_tokenize(checks, tei)
    check_refusals(checks, tei, options)
    if options.classifier:
        check_predict(checks, tei, options.classifier)
    if options.reranker:
        check_rerank(checks, tei, options.reranker)
    channel.close()
    checks.finish()


if __name__ == "__main__":
    main()

"""Cohere's own clients against Andon: rerank in both of their versions.

    python cohere_client.py --http 127.0.0.1:8000 --reranker NAME

The server must serve a reranker of this name, and ask nobody for a key.
"""

import cohere
from cohere.core.api_error import ApiError

from checks import CALL_SECONDS_MAX, Checks, arguments, expect

QUERY = "What burns in a lantern?"
DOCUMENTS = [
    "The tide is low in the morning.",
    "A candle stands in the lantern.",
    "Quarterly revenue rose by four percent.",
    "提灯が静かに揺れている。",
]


def scores(response):
    """(index, score) of each result, the best first."""
    return [(result.index, result.relevance_score) for result in response.results]


def expect_order(response, count):
    """So many different documents, the best first, with probabilities."""
    found = scores(response)
    expect(len(found) == count, f"there are {len(found)} results, expected {count}")
    expect(len({index for index, _ in found}) == count, f"a document comes twice: {found}")
    expect(all(index in range(len(DOCUMENTS)) for index, _ in found), f"they are {found}")
    values = [score for _, score in found]
    expect(values == sorted(values, reverse=True), f"the scores are {values}")
    expect(all(0 <= score <= 1 for score in values), f"the scores are {values}")


def expect_error(call, status):
    """Runs `call`, which must raise the client's error with this status."""
    try:
        call()
    except ApiError as error:
        expect(error.status_code == status, f"status {error.status_code}, expected {status}: {error}")
        expect(isinstance(error.body, dict), f"the body is {error.body!r}")
        return error
    raise AssertionError("the call succeeded")


def check_client(checks, name, client, model):
    """What both versions have in common."""
    with checks.check(f"{name}_all"):
        expect_order(client.rerank(model=model, query=QUERY, documents=DOCUMENTS), len(DOCUMENTS))
    with checks.check(f"{name}_top_n"):
        every = client.rerank(model=model, query=QUERY, documents=DOCUMENTS)
        best = client.rerank(model=model, query=QUERY, documents=DOCUMENTS, top_n=2)
        expect_order(best, 2)
        expect(scores(best) == scores(every)[:2], f"{scores(best)} of {scores(every)}")
    with checks.check(f"{name}_one_document"):
        expect_order(client.rerank(model=model, query=QUERY, documents=DOCUMENTS[:1]), 1)
    with checks.check(f"{name}_no_documents"):
        expect_error(lambda: client.rerank(model=model, query=QUERY, documents=[]), 400)
    with checks.check(f"{name}_unknown_model"):
        refuse = lambda: client.rerank(model="nobody", query=QUERY, documents=DOCUMENTS)
        expect_error(refuse, 404)
    with checks.check(f"{name}_no_reranker"):
        refuse = lambda: client.rerank(model="minilm", query=QUERY, documents=DOCUMENTS)
        expect_error(refuse, 400)
    with checks.check(f"{name}_top_n_of_none"):
        refuse = lambda: client.rerank(model=model, query=QUERY, documents=DOCUMENTS, top_n=0)
        expect_error(refuse, 400)


def main():
    parser = arguments(__doc__.splitlines()[0], ("http",))
    parser.add_argument("--reranker", required=True, metavar="NAME", help="the model")
    options = parser.parse_args()
    checks, model = Checks(), options.reranker
    settings = {
        "api_key": "unused", "base_url": f"http://{options.http}", "timeout": CALL_SECONDS_MAX,
    }
    old, new = cohere.Client(**settings), cohere.ClientV2(**settings)
    check_client(checks, "v1", old, model)
    check_client(checks, "v2", new, model)
    with checks.check("both_versions_alike"):
        body = {"model": model, "query": QUERY, "documents": DOCUMENTS}
        expect(scores(old.rerank(**body)) == scores(new.rerank(**body)), "the scores differ")
    with checks.check("v1_return_documents"):
        response = old.rerank(model=model, query=QUERY, documents=DOCUMENTS, return_documents=True)
        texts = [(result.index, result.document.text) for result in response.results]
        expect(all(DOCUMENTS[index] == text for index, text in texts), f"they are {texts}")
    with checks.check("v1_documents_as_objects"):
        objects = [{"text": text} for text in DOCUMENTS]
        plain = old.rerank(model=model, query=QUERY, documents=DOCUMENTS)
        expect(scores(old.rerank(model=model, query=QUERY, documents=objects)) == scores(plain),
               "the scores differ")
    with checks.check("v2_tokens_per_document"):
        expect_order(
            new.rerank(model=model, query=QUERY, documents=DOCUMENTS, max_tokens_per_doc=512),
            len(DOCUMENTS),
        )
    checks.finish()


if __name__ == "__main__":
    main()

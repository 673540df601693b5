"""The sentence-embedding server that many teams write first: FastAPI and
sentence-transformers in one process of uvicorn. The benchmark's peer.

    python benches/fastapi_peer.py --model models/minilm/1 --port 8080

POST /embed {"inputs": ["a text", ...]} answers {"embeddings": [[...], ...]}.
Threads are left as PyTorch and FastAPI choose them.
"""

import argparse

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer


class EmbedRequest(BaseModel):
    inputs: list[str]


def build(model_folder):
    """The application over one model."""
    model = SentenceTransformer(model_folder, device="cpu")
    app = FastAPI()

    # A plain function: FastAPI runs it in its thread pool.
    @app.post("/embed")
    def embed(request: EmbedRequest):
        vectors = model.encode(
            request.inputs, normalize_embeddings=True, show_progress_bar=False
        )
        return {"embeddings": vectors.tolist()}

    @app.get("/health")
    def health():
        return {"ready": True}

    return app


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/minilm/1", help="the model's folder")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    uvicorn.run(build(options.model), host="127.0.0.1", port=options.port, access_log=False)


if __name__ == "__main__":
    main()

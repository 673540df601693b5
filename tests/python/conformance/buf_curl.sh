#!/usr/bin/env bash
# A generic gRPC command line against Andon, with nothing but reflection:
# `buf curl`, in the place of grpcurl.
#
#     buf_curl.sh 127.0.0.1:8001 PATH/TO/buf
#
# The server must serve `minilm` and `digits`.
set -euo pipefail

if [ $# -ne 2 ]; then
  echo "usage: $0 HOST:PORT PATH/TO/buf" >&2
  exit 2
fi
base="http://$1"
buf="$2"
passed=0
output=""

fail() {
  echo "FAILED $1: $2"
  printf '%s\n' "$output" | head -c 2000
  exit 1
}

# Runs `buf curl` on a path below the server; what it prints is in $output.
call() {
  local path="$1"
  shift
  output="$(timeout 60 "$buf" curl --protocol grpc --http2-prior-knowledge "$@" "$base$path" 2>&1)" || return
  # Whether it writes `"key": value` or `"key":value` is buf's affair.
  output="${output//\": /\":}"
}

# expect NAME TEXT...: each text stands in the output.
expect() {
  local name="$1" text
  shift
  for text in "$@"; do
    case "$output" in
      *"$text"*) ;;
      *) fail "$name" "'$text' is not in the output:" ;;
    esac
  done
  echo "ok $name"
  passed=$((passed + 1))
}

# N copies of a number with commas between them.
numbers() {
  local list
  list="$(printf "$2,%.0s" $(seq "$1"))"
  printf '%s' "${list%,}"
}

for version in grpc-v1 grpc-v1alpha; do
  call "" --reflect-protocol "$version" --list-services || fail "list_services_$version" "refused:"
  expect "list_services_$version" inference.GRPCInferenceService tei.v1.Info tei.v1.Embed \
    tei.v1.Predict tei.v1.Rerank tei.v1.Tokenize grpc.health.v1.Health
  call "" --reflect-protocol "$version" --list-methods || fail "list_methods_$version" "refused:"
  expect "list_methods_$version" inference.GRPCInferenceService/ModelInfer \
    inference.GRPCInferenceService/ModelStreamInfer tei.v1.Embed/EmbedStream
done

call /inference.GRPCInferenceService/ServerReady || fail server_ready "refused:"
expect server_ready '"ready":true'

call /inference.GRPCInferenceService/ModelMetadata -d '{"name": "digits"}' ||
  fail model_metadata "refused:"
expect model_metadata '"pixels"' '"FP32"' '"-1"' '"64"' '"probabilities"' '"label"'

pixels="$(numbers 64 8)"
request='{"model_name": "digits", "id": "from-buf", "inputs": [{"name": "pixels",
  "datatype": "FP32", "shape": [1, 64], "contents": {"fp32_contents": ['"$pixels"']}}]}'
call /inference.GRPCInferenceService/ModelInfer -d "$request" || fail model_infer "refused:"
expect model_infer '"from-buf"' '"probabilities"' '"label"' '"rawOutputContents"'

stream="$request $request"
call /inference.GRPCInferenceService/ModelStreamInfer -d "$stream" || fail model_stream "refused:"
expect model_stream '"inferResponse"' '"rawOutputContents"'

call /tei.v1.Embed/Embed -H 'andon-model: minilm' \
  -d '{"inputs": "a paper lantern", "normalize": true, "dimensions": 8}' || fail embed "refused:"
expect embed '"embeddings"' '"computeTokens"'

call /tei.v1.Info/Info -H 'andon-model: minilm' || fail info "refused:"
expect info '"modelId":"minilm"' '"maxInputLength"'

call /grpc.health.v1.Health/Check -d '{"service": "digits"}' || fail health "refused:"
expect health '"SERVING"'

# buf's exit status is the gRPC status times eight.
refused() {
  local name="$1" code="$2" status=0
  shift 2
  call "$@" || status=$?
  if [ "$status" -ne $((code * 8)) ]; then
    fail "$name" "exit status $status, expected $((code * 8)):"
  fi
}

refused bad_datatype 3 /inference.GRPCInferenceService/ModelInfer -d "${request/FP32/FP33}"
expect bad_datatype invalid_argument google.rpc.BadRequest 'inputs[0].datatype'

refused unknown_model 5 /inference.GRPCInferenceService/ModelInfer -d "${request/digits/nobody}"
expect unknown_model not_found nobody

refused bad_enum 3 /tei.v1.Embed/Embed -H 'andon-model: minilm' \
  -d '{"inputs": "a", "truncation_direction": 7}'
expect bad_enum invalid_argument truncation_direction

refused shared_memory 12 /inference.GRPCInferenceService/SystemSharedMemoryStatus
expect shared_memory unimplemented memory

echo "$passed checks passed"

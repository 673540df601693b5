"""What tritonclient can change in a server: settings, shared memory (which is
refused) and the model repository. triton_client.py runs these checks."""

import threading

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from checks import CALL_SECONDS_MAX, eventually, expect, expect_status
from triton_calls import SENTENCES, embed, expect_refusal, pixel_input


def check_settings(checks, client):
    """Trace and log settings are read and changed; nonsense is refused."""
    with checks.check("trace_settings"):
        before = client.get_trace_settings().settings
        expect("trace_rate" in before, f"no trace_rate among {sorted(before)}")
        old = list(before["trace_rate"].value)
        changed = client.update_trace_settings(settings={"trace_rate": "500"}).settings
        expect(list(changed["trace_rate"].value) == ["500"], f"it is {changed['trace_rate']}")
        now = client.get_trace_settings().settings["trace_rate"].value
        expect(list(now) == ["500"], f"reads back as {list(now)}")
        client.update_trace_settings(settings={"trace_rate": old})
        now = client.get_trace_settings().settings["trace_rate"].value
        expect(list(now) == old, f"it was {old} and is {list(now)}")
        refuse = lambda: client.update_trace_settings(settings={"nonsense": "1"})
        expect_refusal(refuse, "INVALID_ARGUMENT")
        refuse = lambda: client.update_trace_settings(settings={"trace_rate": "often"})
        expect_refusal(refuse, "INVALID_ARGUMENT")
    with checks.check("log_settings"):
        before = client.get_log_settings().settings
        expect("log_verbose_level" in before, f"no log_verbose_level among {sorted(before)}")
        old = before["log_verbose_level"].uint32_param
        changed = client.update_log_settings({"log_verbose_level": 1}).settings
        level = changed["log_verbose_level"].uint32_param
        expect(level == 1, f"the changed level is {level}")
        level = client.get_log_settings().settings["log_verbose_level"].uint32_param
        expect(level == 1, f"the level reads back as {level}")
        client.update_log_settings({"log_verbose_level": old})
        level = client.get_log_settings().settings["log_verbose_level"].uint32_param
        expect(level == old, f"the level was {old} and is {level}")
        refuse = lambda: client.update_log_settings({"nonsense": True})
        expect_refusal(refuse, "INVALID_ARGUMENT")


def check_shared_memory(checks, client):
    """What makes no sense here says so in a sentence."""
    calls = {
        "get_system_shared_memory_status": lambda: client.get_system_shared_memory_status(),
        "register_system_shared_memory": lambda: client.register_system_shared_memory(
            "region", "/region", 64
        ),
        "unregister_system_shared_memory": lambda: client.unregister_system_shared_memory(),
        "get_cuda_shared_memory_status": lambda: client.get_cuda_shared_memory_status(),
        "register_cuda_shared_memory": lambda: client.register_cuda_shared_memory(
            "region", "aGFuZGxl", 0, 64
        ),
        "unregister_cuda_shared_memory": lambda: client.unregister_cuda_shared_memory(),
    }
    for name, call in calls.items():
        with checks.check(name):
            error = expect_refusal(call, "UNIMPLEMENTED")
            words = error.message().split()
            expect(len(words) >= 4, f"the message is no sentence: {error.message()!r}")
            expect("memory" in error.message(), f"it does not say what: {error.message()!r}")


def check_load_errors(checks, client):
    """Loading what is not there."""
    with checks.check("load_unknown"):
        error = expect_refusal(lambda: client.load_model("nobody"), "NOT_FOUND")
        expect("nobody" in error.message(), f"it does not name it: {error.message()!r}")
        expect_refusal(lambda: client.unload_model("nobody"), "NOT_FOUND")
    with checks.check("load_with_files"):
        refuse = lambda: client.load_model("digits", config="{}", files={"file:1/x": b"x"})
        expect_refusal(refuse, "INVALID_ARGUMENT", "UNIMPLEMENTED")
        expect(client.is_model_ready("digits"), "digits is gone after a refused load")


def check_repository_control(checks, client, channel, digits):
    """digits goes and comes back while minilm keeps answering."""
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    inputs = pixel_input(digits.data[:1])
    stop, succeeded, errors = threading.Event(), [], []

    def keep_asking():
        while not stop.is_set():
            try:
                succeeded.append(embed(client, SENTENCES[:1]).shape)
            except Exception as error:
                errors.append(error)

    def is_ready(model):
        try:
            return client.is_model_ready(model)
        except InferenceServerException as error:
            expect(error.status() == "StatusCode.NOT_FOUND", f"ModelReady: {error}")
            return False

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        with checks.check("unload"):
            client.unload_model("digits")
            eventually(lambda: not is_ready("digits"), "digits is still ready")
            expect_refusal(lambda: client.infer("digits", inputs), "NOT_FOUND")
            named = lambda: client.infer("digits", inputs, model_version="1")
            expect_refusal(named, "UNAVAILABLE")
            index = client.get_model_repository_index().models
            states = [entry.state for entry in index if entry.name == "digits"]
            expect("READY" not in states, f"the index still says READY: {states}")
            expect(is_ready("minilm"), "minilm went away with digits")
        with checks.check("load"):
            client.load_model("digits")
            eventually(lambda: is_ready("digits"), "digits does not come back")
            label = client.infer("digits", inputs).as_numpy("label")
            expect(int(label[0]) == int(digits.target[0]), f"the label is {label}")
            index = client.get_model_repository_index().models
            states = [entry.state for entry in index if entry.name == "digits"]
            expect(states == ["READY"], f"the index says {states}")
        with checks.check("load_again"):
            client.load_model("digits")
            eventually(lambda: is_ready("digits"), "digits is lost after a second load")
            client.infer("digits", inputs)
        with checks.check("load_kserve_dialect"):
            # KServe's SDK sends the model's name as field 1.
            unload = service_pb2.RepositoryModelUnloadRequest(repository_name="digits")
            stub.RepositoryModelUnload(unload, timeout=CALL_SECONDS_MAX)
            eventually(lambda: not is_ready("digits"), "digits is still ready")
            load = service_pb2.RepositoryModelLoadRequest(repository_name="digits")
            stub.RepositoryModelLoad(load, timeout=CALL_SECONDS_MAX)
            eventually(lambda: is_ready("digits"), "digits does not come back")
        with checks.check("load_no_name"):
            request = service_pb2.RepositoryModelLoadRequest()
            refuse = lambda: stub.RepositoryModelLoad(request, timeout=CALL_SECONDS_MAX)
            expect_status(refuse, grpc.StatusCode.INVALID_ARGUMENT)
    finally:
        stop.set()
        asking.join()
    with checks.check("minilm_undisturbed"):
        expect(not errors, f"{len(errors)} calls of minilm failed meanwhile: {errors[:1]}")
        expect(len(succeeded) > 0, "minilm was not called meanwhile")

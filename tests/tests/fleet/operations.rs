//! What those who run a fleet rely on: configuration, metrics, traces, memory,
//! models that come and go.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{client, infer, pixels, texts};
use fleet_tests::load::Load;
use fleet_tests::process::{Andon, free_port, scratch};
use fleet_tests::redis::Redis;
use fleet_tests::{Fleet, models, program, root, soaking, until};
use protocol::inference::{RepositoryModelLoadRequest, RepositoryModelUnloadRequest};
use serde_json::json;
use tonic::Code;

/// Runs `andon` to its end and returns what it wrote to standard error.
fn refused(arguments: &[&str], variables: &[(&str, &str)]) -> Result<String> {
    let output = Command::new(program("andon")?)
        .args(arguments)
        .envs(variables.iter().copied())
        .output()?;
    ensure!(!output.status.success(), "it started: {arguments:?}");
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn wrong_configuration_is_refused_before_a_port_opens() -> Result<()> {
    let repository = models()?.display().to_string();
    let file = scratch("wrong.toml")?;
    let config = file.display().to_string();
    let wrong = |text: &str| -> Result<String> {
        std::fs::write(&file, text)?;
        refused(&["worker", "--config", &config], &[])
    };
    let error = wrong("no_such_key = 1")?;
    ensure!(
        error.contains("no_such_key") && error.contains("grpc_addr"),
        "{error}"
    );
    ensure!(wrong("grpc_addr = \"nowhere\"")?.contains("grpc-addr"));
    ensure!(wrong("grpc_addr = ")?.contains("not TOML"));
    ensure!(wrong("[grpc_addr]")?.contains("grpc_addr"));
    let error = refused(&["worker", "--repository", "/nowhere"], &[])?;
    ensure!(error.contains("is not a folder"), "{error}");
    let error = refused(&["worker"], &[("ANDON_REPOSITORY", "/nowhere")])?;
    ensure!(error.contains("is not a folder"), "{error}");
    let error = refused(
        &["worker", "--repository", &repository, "--models", "nobody"],
        &[],
    )?;
    ensure!(error.contains("nobody"), "{error}");
    let worker = |flags: &[&str]| -> Result<String> {
        let fixed = ["worker", "--repository", &repository];
        refused(&[&fixed, flags].concat(), &[])
    };
    ensure!(worker(&["--device", "cuda:0"])?.contains("CUDA"));
    ensure!(worker(&["--keepalive-interval", "0s"])?.contains("greater than zero"));
    ensure!(worker(&["--deadline-max", "1h"])?.contains("--drain-deadline"));
    ensure!(worker(&["--message-bytes-max", "2GiB"])?.contains("--bytes-in-flight-max"));
    ensure!(refused(&["gateway"], &[])?.contains("--worker"));
    ensure!(refused(&["gateway", "--worker", "nowhere"], &[])?.contains("HOST:PORT"));
    std::fs::remove_file(&file)?;
    Ok(())
}

#[tokio::test]
async fn a_file_configures_and_variables_and_flags_override_it() -> Result<()> {
    let (from_file, from_variable) = (free_port()?, free_port()?);
    let file = scratch("worker.toml")?;
    let text = format!(
        "repository = {:?}\nmodels = [\"digits\"]\ngrpc_addr = \"{from_file}\"\nlog = \"debug\"\n",
        models()?
    );
    std::fs::write(&file, text)?;
    let mut child = tokio::process::Command::new(program("andon")?)
        .args(["worker", "--config"])
        .arg(&file)
        .args(["--admin-addr", "127.0.0.1:0", "--log", "warn"])
        .env("ANDON_GRPC_ADDR", from_variable.to_string())
        .kill_on_drop(true)
        .spawn()?;
    until(
        Duration::from_secs(20),
        "served where the variable says",
        || async {
            let client = client(from_variable).await?;
            Ok(infer(&client, pixels(&[[0.0; 64]]), Duration::from_secs(5))
                .await
                .is_ok())
        },
    )
    .await?;
    ensure!(client(from_file).await.is_err(), "the file's port is open");
    let other = infer(
        &client(from_variable).await?,
        texts(&["a"]),
        Duration::from_secs(5),
    )
    .await;
    ensure!(other.err().map(|status| status.code()) == Some(Code::NotFound));
    child.kill().await?;
    std::fs::remove_file(&file)?;
    Ok(())
}

/// What the pages of a gateway without tenants and providers do not show: it is
/// registered under this name at least.
const LABELLED: [&str; 11] = [
    "auth_refused",
    "cost",
    "fallbacks",
    "limited",
    "provider_breaker_open",
    "provider_cost",
    "provider_duration_seconds",
    "provider_requests",
    "provider_retries",
    "tenant_calls",
    "tokens",
];

#[tokio::test]
async fn every_metric_that_dashboards_name_is_there() -> Result<()> {
    let mut registered = String::new();
    for file in [
        "gateway/src/auth/metrics.rs",
        "gateway/src/limit/metrics.rs",
        "providers/src/metrics.rs",
    ] {
        let path = root().join("crates").join(file);
        registered.push_str(&std::fs::read_to_string(path)?);
    }
    let redis = Redis::start().await?;
    let secret = scratch("secret")?;
    std::fs::write(&secret, "a secret of the cache, of some length\n")?;
    let path = secret.display().to_string();
    let flags = ["--redis", &redis.url(), "--cache-secret-file", &path];
    let fleet = Fleet::with(1, &[], &flags).await?;
    let client = client(fleet.gateway.grpc).await?;
    infer(&client, pixels(&[[0.0; 64]]), Duration::from_secs(5)).await?;
    infer(&client, texts(&["a text"]), Duration::from_secs(5)).await?;
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    let mut page = fleet.gateway.get("/metrics").await?;
    page.push_str(&worker.get("/metrics").await?);
    let names = std::fs::read_to_string(root().join("tests/manifests/metrics.txt"))?;
    for name in names
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        let family = name
            .strip_suffix("_total")
            .or_else(|| name.strip_suffix("_bucket"))
            .or_else(|| name.strip_suffix("_info"))
            .unwrap_or(name);
        // What is counted by tenant, provider or refusal appears with the first.
        let known = match family.strip_prefix("andon_gateway_") {
            Some(short) if LABELLED.contains(&short) => {
                registered.contains(&format!("name(\"{short}\")"))
                    || registered.contains(&format!("\"{family}\""))
            }
            // A counter is described by the name of its samples.
            _ => [name, family]
                .iter()
                .any(|described| page.contains(&format!("# TYPE {described} "))),
        };
        ensure!(known, "{name} is not on the metrics pages");
    }
    let exact = "nv_inference_request_success{model=\"minilm\",version=\"1\"}";
    ensure!(worker.metric(exact).await? == Some(1.0), "{page}");
    for line in [
        "# TYPE nv_inference_request_success counter",
        "# TYPE nv_inference_queue_duration_us counter",
        "# TYPE nv_inference_pending_request_count gauge",
        "# TYPE andon_worker_requests_total counter",
    ] {
        ensure!(page.lines().any(|one| one == line), "{line}: {page}");
    }
    std::fs::remove_file(&secret)?;
    Ok(())
}

#[tokio::test]
async fn a_model_comes_and_goes_while_another_serves() -> Result<()> {
    let mut fleet = Fleet::start(1).await?;
    let mut client = client(fleet.gateway.grpc).await?;
    let load = Load::start(&client, &pixels(&[[1.0; 64]]), 4, usize::MAX);
    load.reached(200).await?;
    let worker = fleet.workers[0].take().context("a worker")?;
    let loaded = worker.resident_bytes()?;
    let unload = RepositoryModelUnloadRequest {
        model_name: "minilm".to_owned(),
        ..Default::default()
    };
    client.repository_model_unload(unload).await?;
    let gone = infer(&client, texts(&["a"]), Duration::from_secs(5)).await;
    ensure!(gone.err().map(|status| status.code()) == Some(Code::NotFound));
    // The weights are 90 MB.
    until(
        Duration::from_secs(10),
        "the memory is given back",
        || async { Ok(worker.resident_bytes()? + (60 << 20) < loaded) },
    )
    .await
    .with_context(|| format!("{} of {loaded} bytes", worker.resident_bytes().unwrap_or(0)))?;
    // KServe's dialect: the name stands in the first field.
    let load_again = RepositoryModelLoadRequest {
        repository_name: "minilm".to_owned(),
        ..Default::default()
    };
    client.repository_model_load(load_again).await?;
    infer(&client, texts(&["a"]), Duration::from_secs(5)).await?;
    let outcome = load.stopped().await;
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    Ok(())
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_and_says_when_to_come_back() -> Result<()> {
    let repository = scratch("repository")?;
    std::fs::create_dir_all(repository.join("minilm"))?;
    copy_folder(&models()?.join("minilm/1"), &repository.join("minilm/1"))?;
    std::fs::write(
        repository.join("minilm/andon.toml"),
        "request_rows_max = 64\nqueue_rows_max = 64\nbatch_tokens_max = 512\n",
    )?;
    let flags = ["--repository".to_owned(), repository.display().to_string()];
    let worker = Andon::start("worker", &flags, None)?;
    worker.ready().await?;
    let client = client(worker.grpc).await?;
    let request = texts(&vec!["words that take a while to compute ".repeat(8); 64]);
    let load = Load::start(&client, &request, 8, 40);
    let outcome = load.finished().await;
    ensure!(outcome.succeeded > 0, "{outcome:?}");
    let full = outcome
        .failed
        .keys()
        .all(|error| error.starts_with("Unavailable"));
    ensure!(full && !outcome.failed.is_empty(), "{:?}", outcome.failed);
    std::fs::remove_dir_all(&repository)?;
    Ok(())
}

#[tokio::test]
async fn a_broken_new_version_leaves_the_old_one_serving() -> Result<()> {
    let repository = scratch("repository")?;
    copy_folder(&models()?.join("digits/1"), &repository.join("digits/1"))?;
    let flags = ["--repository".to_owned(), repository.display().to_string()];
    let worker = Andon::start("worker", &flags, None)?;
    worker.ready().await?;
    let mut client = client(worker.grpc).await?;
    let load = RepositoryModelLoadRequest {
        model_name: "digits".to_owned(),
        ..Default::default()
    };
    let broken = repository.join("digits/2");
    copy_folder(&models()?.join("digits/1"), &broken)?;
    std::fs::write(broken.join("model.safetensors"), b"\x80\x02not weights")?;
    let refused = client.repository_model_load(load.clone()).await;
    let error = refused.err().context("it was loaded")?;
    ensure!(error.message().contains("model.safetensors"), "{error:?}");
    ensure!(
        !error.message().contains(&repository.display().to_string()),
        "{error:?}"
    );
    infer(&client, pixels(&[[0.0; 64]]), Duration::from_secs(5)).await?;
    copy_folder(&models()?.join("digits/1"), &broken)?;
    client.repository_model_load(load).await?;
    let response = infer(&client, pixels(&[[0.0; 64]]), Duration::from_secs(5)).await?;
    ensure!(response.model_version == "2", "{}", response.model_version);
    std::fs::remove_dir_all(&repository)?;
    Ok(())
}

#[tokio::test]
async fn a_broken_newest_version_serves_once_its_files_are_whole() -> Result<()> {
    let repository = scratch("repository")?;
    let whole = models()?.join("digits/1");
    let weights = repository.join("digits/1/model.safetensors");
    copy_folder(&whole, &repository.join("digits/1"))?;
    std::fs::write(&weights, b"half")?;
    let flags = ["--repository".to_owned(), repository.display().to_string()];
    let worker = Andon::start("worker", &flags, None)?;
    let refused = "the model cannot be loaded";
    until(Duration::from_secs(30), "it is refused", || async {
        Ok(worker.logged().contains(refused))
    })
    .await?;
    // Nobody asks for it again.
    std::fs::copy(whole.join("model.safetensors"), &weights)?;
    worker.ready().await?;
    let client = client(worker.grpc).await?;
    infer(&client, pixels(&[[0.0; 64]]), Duration::from_secs(5)).await?;
    std::fs::remove_dir_all(&repository)?;
    Ok(())
}

#[tokio::test]
async fn threads_and_connections_follow_the_cores_that_are_set() -> Result<()> {
    let shards = |andon: &Andon| -> Result<usize> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", andon.id()))?;
        let names = tasks.flatten().map(|task| task.path().join("comm"));
        let names = names.filter_map(|path| std::fs::read_to_string(path).ok());
        Ok(names.filter(|name| name.starts_with("shard-")).count())
    };
    for cores in [1, 3] {
        let count = cores.to_string();
        let flags = ["--cores", count.as_str()];
        let fleet = Fleet::with(1, &flags, &flags).await?;
        let worker = fleet.workers[0].as_ref().context("a worker")?;
        let found = (shards(&fleet.gateway)?, shards(worker)?);
        ensure!(found == (cores, cores), "{found:?}");
        // One from each thread of the gateway, and one for reports.
        let open = worker
            .metric("andon_connections{listener=\"worker\"}")
            .await?;
        ensure!(open == Some(cores as f64 + 1.0), "{open:?}");
    }
    Ok(())
}

fn copy_folder(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn memory_stays_level() -> Result<()> {
    let later = if soaking() { 290_000 } else { 30_000 };
    let flags = ["--repository".to_owned(), models()?.display().to_string()];
    let serve = Andon::start("serve", &flags, None)?;
    serve.ready().await?;
    let client = client(serve.grpc).await?;
    let text = texts(&["a sentence of about ten words to be made a vector"]);
    let pixels = pixels(&[[2.0; 64]]);
    let both = async |count: usize| -> Result<()> {
        let texts = Load::start(&client, &text, 8, count / 50);
        let digits = Load::start(&client, &pixels, 8, count - count / 50);
        for outcome in [texts.finished().await, digits.finished().await] {
            ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
        }
        Ok(())
    };
    // Beside other tests, batches of every size have been made only by then.
    both(10_000).await?;
    let early = serve.resident_bytes()?;
    both(later).await?;
    let late = serve.resident_bytes()?;
    ensure!(
        late as f64 <= early as f64 * 1.05,
        "{early} bytes after 10,000 requests, {late} after {later} more"
    );
    Ok(())
}

#[tokio::test]
async fn traces_reach_a_collector_and_follow_the_call() -> Result<()> {
    let collector = free_port()?;
    let seen = scratch("spans")?;
    let mut child = tokio::process::Command::new(root().join("target/venv/bin/python"))
        .arg(root().join("tests/python/collector.py"))
        .arg(collector.to_string())
        .arg(&seen)
        .kill_on_drop(true)
        .spawn()?;
    let endpoint = format!("http://{collector}");
    let flags = ["--otlp-endpoint", endpoint.as_str()];
    let mut fleet = Fleet::with(1, &flags, &flags).await?;
    let mut request = tonic::Request::new(pixels(&[[0.0; 64]]));
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let parent = format!("00-{trace}-b7ad6b7169203331-01");
    request
        .metadata_mut()
        .insert("traceparent", parent.parse()?);
    client(fleet.gateway.grpc)
        .await?
        .model_infer(request)
        .await?;
    fleet.gateway.signal(libc::SIGTERM)?;
    let worker = fleet.workers[0].as_mut().context("a worker")?;
    worker.signal(libc::SIGTERM)?;
    until(
        Duration::from_secs(20),
        "both spans of the trace arrive",
        || async {
            let spans = std::fs::read_to_string(&seen)?;
            let of_trace: Vec<&str> = spans.lines().filter(|line| line.contains(trace)).collect();
            Ok(of_trace.iter().any(|line| line.contains("andon-gateway"))
                && of_trace.iter().any(|line| line.contains("andon-worker")))
        },
    )
    .await?;
    child.kill().await?;
    std::fs::remove_file(&seen)?;
    Ok(())
}

#[tokio::test]
async fn the_log_of_a_traced_call_holds_nothing_of_its_caller() -> Result<()> {
    // Nobody takes connections at either address: the provider fails inside the
    // span of the call, which is worth a line.
    let (service, collector) = (free_port()?, free_port()?);
    let (policy, catalogue) = (scratch("policy.toml")?, scratch("providers.toml")?);
    std::fs::write(
        &policy,
        "anonymous = \"quietfolk\"\n[tenants.quietfolk]\nmodels = [\"*\"]\n",
    )?;
    std::fs::write(
        &catalogue,
        format!(
            "[models.outside]\nkind = \"openai\"\ntask = \"embedding\"\n\
             base_url = \"http://{service}/v1\"\nmodel = \"m\"\n"
        ),
    )?;
    for format in ["text", "json"] {
        let flags = [
            "--policy".to_owned(),
            policy.display().to_string(),
            "--providers".to_owned(),
            catalogue.display().to_string(),
            "--otlp-endpoint".to_owned(),
            format!("http://{collector}"),
            "--log".to_owned(),
            "debug".to_owned(),
            "--log-format".to_owned(),
            format.to_owned(),
        ];
        let gateway = Andon::start("gateway", &flags, None)?;
        gateway.ready().await?;
        let client = reqwest::Client::builder().no_proxy().build()?;
        let response = client
            .post(format!("http://{}/v1/embeddings", gateway.http))
            .header("x-request-id", "set-by-the-caller")
            .json(&json!({ "model": "outside", "input": "a text" }))
            .send()
            .await?;
        ensure!(response.status().as_u16() == 503, "{}", response.status());
        let log = gateway.logged();
        ensure!(log.contains("a provider could not be called"), "{log}");
        for word in ["set-by-the-caller", "quietfolk", "andon.", "otel.name"] {
            ensure!(!log.contains(word), "{word} is in the log: {log}");
        }
    }
    std::fs::remove_file(&policy)?;
    std::fs::remove_file(&catalogue)?;
    Ok(())
}

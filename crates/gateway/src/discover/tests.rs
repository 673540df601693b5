//! Workers that fall silent, come and go, on a clock that is paused.

use std::cell::Cell;

use platform::memory::{Acceptor, pair};
use platform::metrics::Metrics;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;

/// Workers that are connected and have just reported.
fn discovery(addresses: &[&str]) -> Discovery {
    let metrics = UpstreamMetrics::register(&Metrics::default());
    let worker = |address: &&str| {
        let target = Target::Tcp((*address).to_owned());
        let own = metrics.of((*address).to_owned());
        let upstream = Arc::new(Upstream::new(target, own, Starvation::none()));
        upstream.set_channels(vec![Vec::new()]);
        upstream.heard();
        let worker = DiscoveredWorker {
            upstream,
            sources: BTreeSet::new(),
            _task: spawn_owned(async {}),
        };
        ((*address).to_owned(), worker)
    };
    Discovery {
        routes: Arc::default(),
        metrics: metrics.clone(),
        connecting: Connecting {
            connections: 1,
            shards: Arc::new(Shards::start(1).unwrap()),
            metrics: DiscoverMetrics::register(&Metrics::default()),
        },
        starvation: Starvation::none(),
        workers: Mutex::new(addresses.iter().map(worker).collect()),
    }
}

fn upstream(discovery: &Discovery, address: &str) -> Arc<Upstream> {
    discovery.lock()[address].upstream.clone()
}

#[tokio::test(start_paused = true)]
async fn a_silent_worker_is_lost_and_most_at_once_are_kept() {
    let discovery = discovery(&["a", "b", "c"]);
    let silent = upstream(&discovery, "a");
    tokio::time::advance(REPORT_TIMEOUT / 2).await;
    assert!(
        discovery.excuses(&silent),
        "it is not silent for long enough"
    );
    tokio::time::advance(REPORT_TIMEOUT / 2).await;
    assert!(discovery.excuses(&silent), "all are silent");
    upstream(&discovery, "b").heard();
    assert!(discovery.excuses(&silent), "two of three are silent");
    upstream(&discovery, "c").heard();
    assert!(!discovery.excuses(&silent), "it alone is silent");
    tokio::time::advance(KEPT_MAX).await;
    assert!(!discovery.excuses(&silent), "they are not kept for ever");
}

#[tokio::test(start_paused = true)]
async fn the_only_worker_is_lost_when_it_is_silent() {
    let discovery = discovery(&["a"]);
    tokio::time::advance(REPORT_TIMEOUT).await;
    assert!(!discovery.excuses(&upstream(&discovery, "a")));
}

/// A worker reports that it serves a model.
fn serves(discovery: &Discovery, address: &str, model: &str) {
    let model = ModelReport {
        name: model.to_owned(),
        version: "1".to_owned(),
        ready: true,
        ..Default::default()
    };
    upstream(discovery, address).set_report(WatchReportResponse {
        draining: false,
        models: vec![model],
    });
}

/// Workers of one name, the first of which serves a model.
fn named(addresses: &[&str]) -> Arc<Discovery> {
    let discovery = Arc::new(discovery(addresses));
    for worker in discovery.lock().values_mut() {
        worker.sources.insert("name".to_owned());
    }
    serves(&discovery, "a", "minilm");
    discovery
}

fn is_there(discovery: &Discovery, address: &str) -> bool {
    discovery.lock().contains_key(address)
}

#[tokio::test(start_paused = true)]
async fn an_old_worker_goes_when_its_successor_has_reported() {
    let discovery = named(&["a", "b"]);
    let found = BTreeSet::from(["b".to_owned()]);
    let mut leaving = BTreeMap::new();
    discovery.update("name", &found, &mut leaving);
    serves(&discovery, "b", "another model");
    discovery.update("name", &found, &mut leaving);
    assert!(is_there(&discovery, "a"), "nobody else serves its model");
    serves(&discovery, "b", "minilm");
    discovery.update("name", &found, &mut leaving);
    assert!(!is_there(&discovery, "a") && is_there(&discovery, "b"));
    assert!(leaving.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_worker_without_a_successor_goes_when_it_is_gone_or_late() {
    let none = BTreeSet::new();
    let (discovery, mut leaving) = (named(&["a"]), BTreeMap::new());
    discovery.update("name", &none, &mut leaving);
    assert!(is_there(&discovery, "a"));
    upstream(&discovery, "a").set_channels(Vec::new());
    discovery.update("name", &none, &mut leaving);
    assert!(!is_there(&discovery, "a"), "it is unreachable");

    let (discovery, mut leaving) = (named(&["a"]), BTreeMap::new());
    discovery.update("name", &none, &mut leaving);
    tokio::time::advance(LEAVING_MAX / 2).await;
    // A name that lists it again begins anew.
    discovery.update("name", &["a".to_owned()].into(), &mut leaving);
    discovery.update("name", &none, &mut leaving);
    tokio::time::advance(LEAVING_MAX / 2).await;
    discovery.update("name", &none, &mut leaving);
    assert!(is_there(&discovery, "a"));
    tokio::time::advance(LEAVING_MAX / 2).await;
    discovery.update("name", &none, &mut leaving);
    assert!(!is_there(&discovery, "a"), "it is kept for a while only");
}

/// Takes a request and sends one report without a field, in the frames of HTTP/2.
async fn report(io: &mut DuplexStream) -> std::io::Result<()> {
    const HEADERS: u8 = 1;
    let mut preface = [0; 24];
    io.read_exact(&mut preface).await?;
    let mut kind = 0;
    while kind != HEADERS {
        let mut head = [0; 9];
        io.read_exact(&mut head).await?;
        kind = head[3];
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        io.read_exact(&mut vec![0; length as usize]).await?;
    }
    // The settings, the status 200 of the first stream, and its message.
    io.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await?;
    io.write_all(&[0, 0, 1, 1, 4, 0, 0, 0, 1, 0x88]).await?;
    io.write_all(&[0, 0, 5, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0])
        .await
}

/// A server that is silent after its first report, and keeps its connections.
fn silent_server(mut acceptor: Acceptor) -> OwnedTask {
    spawn_owned(async move {
        let mut open = Vec::new();
        while let Some(mut io) = acceptor.accept().await {
            report(&mut io).await.unwrap();
            open.push(io);
        }
    })
}

#[tokio::test(start_paused = true)]
async fn a_worker_of_this_process_is_never_declared_silent() {
    let (connector, acceptor) = pair();
    let _server = silent_server(acceptor);
    let metrics = UpstreamMetrics::register(&Metrics::default());
    let worker = |target| Upstream::new(target, metrics.of("a".to_owned()), Starvation::none());
    let opened = Cell::new(0);
    let changed = || opened.set(opened.get() + 1);
    // Another worker that behaves so is declared silent at the timeout.
    let memory = Target::Memory(connector);
    let channel = Channel::connect(&memory, CONNECT_TIMEOUT).await.unwrap();
    let other = worker(Target::Tcp("a".to_owned()));
    let begun = Instant::now();
    let silent = watch_reports(&other, &channel, &changed).await.unwrap_err();
    assert_eq!(silent.code(), Code::DeadlineExceeded);
    assert_eq!(begun.elapsed().as_secs(), REPORT_TIMEOUT.as_secs());
    assert_eq!(opened.get(), 1, "the first report came");

    let day = Duration::from_secs(24 * 3600);
    let own = worker(memory);
    let asked = Cell::new(false);
    let excused = || {
        asked.set(true);
        false
    };
    let followed = tokio::time::timeout(day, follow(&own, &changed, &excused)).await;
    assert!(followed.is_err(), "it is lost: {followed:?}");
    assert!(!asked.get(), "nobody asks for an excuse");
    assert_eq!(opened.get(), 2, "its first report came");
    assert!(own.silence() >= day - REPORT_TIMEOUT);
}

#[tokio::test]
async fn a_model_that_loads_is_not_ready_and_one_that_was_unloaded_is_unknown() {
    let discovery = discovery(&["a"]);
    let reported = |change: fn(&mut ModelReport)| {
        let mut model = ModelReport {
            name: "slow".to_owned(),
            version: "1".to_owned(),
            ..Default::default()
        };
        change(&mut model);
        let report = WatchReportResponse {
            draining: false,
            models: vec![model],
        };
        assert!(upstream(&discovery, "a").set_report(report), "no change");
        discovery.rebuild();
        let table = discovery.routes.table();
        ["", "1"].map(|version| table.named("slow", version, "model_name").err())
    };
    let [newest, named] = reported(|model| model.loading = true);
    for error in [newest.unwrap(), named.unwrap()] {
        assert_eq!(error.kind(), protocol::Kind::NotReady, "{error}");
        assert!(error.retry_after().is_some(), "{error}");
        assert!(error.to_string().ends_with("is LOADING"), "{error}");
    }
    let [newest, _] = reported(|model| model.failed = true);
    assert_eq!(newest.unwrap().kind(), protocol::Kind::NotReady);
    let [newest, _] = reported(|_| {});
    assert_eq!(newest.unwrap().kind(), protocol::Kind::NotFound);
    assert_eq!(reported(|model| model.ready = true), [None, None]);
}

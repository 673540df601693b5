//! A server of the Open Inference Protocol that is not Andon's worker: model
//! `echo` answers its input, after `--delay`. It reports nothing of its own, so
//! that a gateway must ask it, as it must any server of another make.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use platform::drain::{self, Phase};
use platform::grpc::{
    Call, Message, MessageLimits, Metadata, Reply, decode, frame, reject, reply, unary,
};
use platform::metrics::Metrics;
use platform::pool::WorkPool;
use platform::server::{
    ConnectionMetrics, Grpc, Handler, Listener, Server, ServerSettings, WORKER_HEADER_BYTES_MAX,
    bind,
};
use platform::shards::Shards;
use platform::{admin, health::Health, tasks::spawn_owned};
use protocol::inference::model_infer_response::InferOutputTensor;
use protocol::inference::model_metadata_response::TensorMetadata;
use protocol::inference::repository_index_response::ModelIndex;
use protocol::inference::{
    ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse,
    RepositoryIndexRequest, RepositoryIndexResponse,
};
use tonic::Status;

#[derive(Debug, Parser)]
struct Arguments {
    #[arg(long)]
    grpc_addr: SocketAddr,
    #[arg(long, default_value = "127.0.0.1:0")]
    admin_addr: SocketAddr,
    #[arg(long, default_value = "0s", value_parser = platform::config::duration)]
    delay: Duration,
    /// The process ends at once when an input has this text.
    #[arg(long)]
    dies_of: Option<String>,
    /// A call with an input that has this text fails with INTERNAL.
    #[arg(long)]
    fails_on: Option<String>,
    /// Every call is refused, since too much waits.
    #[arg(long)]
    is_late: bool,
    #[command(flatten)]
    server: ServerSettings,
}

#[derive(Debug, Clone)]
struct Echo(Arc<EchoSettings>);

#[derive(Debug)]
struct EchoSettings {
    limits: MessageLimits,
    delay: Duration,
    dies_of: Option<String>,
    fails_on: Option<String>,
    is_late: bool,
}

impl Handler for Echo {
    async fn handle(&self, call: Call) -> Reply {
        self.answer(call)
            .await
            .unwrap_or_else(|status| reject(&status))
    }
}

impl Echo {
    async fn answer(&self, call: Call) -> Result<Reply, Status> {
        let EchoSettings {
            limits,
            delay,
            dies_of,
            fails_on,
            is_late,
        } = &*self.0;
        let has = |message: &Message, text: &Option<String>| {
            let text = text.as_ref().map(String::as_bytes);
            text.is_some_and(|text| contains(message.framed(), text))
        };
        match call.path().rsplit('/').next() {
            Some("ModelInfer") => {
                let message = call.into_messages(limits).only().await?;
                if has(&message, dies_of) {
                    std::process::exit(1);
                }
                if has(&message, fails_on) {
                    return Err(Status::internal("the input makes the model fail"));
                }
                if *is_late {
                    return Err(Status::deadline_exceeded("too much waits"));
                }
                if !delay.is_zero() {
                    tokio::time::sleep(*delay).await;
                }
                let response = echo(decode(message.bytes())?)?;
                Ok(reply(frame(&response), Metadata::new()))
            }
            Some("ModelMetadata") => {
                unary(call, limits, |_: ModelMetadataRequest| async {
                    Ok(metadata())
                })
                .await
            }
            Some("RepositoryIndex") => {
                unary(call, limits, |_: RepositoryIndexRequest| async {
                    let model = ModelIndex {
                        name: "echo".to_owned(),
                        version: "1".to_owned(),
                        state: "READY".to_owned(),
                        reason: String::new(),
                    };
                    Ok(RepositoryIndexResponse {
                        models: vec![model],
                    })
                })
                .await
            }
            _ => Err(Status::unimplemented("the echo server has no such call")),
        }
    }
}

fn contains(message: &[u8], text: &[u8]) -> bool {
    message.windows(text.len()).any(|window| window == text)
}

fn echo(request: ModelInferRequest) -> Result<ModelInferResponse, Status> {
    let input = request.inputs.into_iter().next();
    let input = input.ok_or_else(|| Status::invalid_argument("inputs: there are none"))?;
    Ok(ModelInferResponse {
        model_name: request.model_name,
        model_version: "1".to_owned(),
        id: request.id,
        outputs: vec![InferOutputTensor {
            name: input.name,
            datatype: input.datatype,
            shape: input.shape,
            ..Default::default()
        }],
        raw_output_contents: request.raw_input_contents,
        ..Default::default()
    })
}

fn metadata() -> ModelMetadataResponse {
    let data = TensorMetadata {
        name: "data".to_owned(),
        datatype: "BYTES".to_owned(),
        shape: vec![-1],
    };
    ModelMetadataResponse {
        name: "echo".to_owned(),
        versions: vec!["1".to_owned()],
        platform: "echo".to_owned(),
        inputs: vec![data.clone()],
        outputs: vec![data],
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let (trigger, drain) = drain::channel();
    let metrics = Arc::new(Metrics::default());
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let health = Health::default();
    health.replace(true, &[], []);
    let pool = WorkPool::start(cores, arguments.server.work_items_max as usize, &metrics)?;
    let limits = arguments.server.message_limits(&metrics, &pool);
    let server = Server {
        name: "echo",
        settings: arguments.server.clone(),
        header_bytes_max: WORKER_HEADER_BYTES_MAX,
        metrics: ConnectionMetrics::register(&metrics),
        shards: Arc::new(Shards::start(cores)?),
        limits: Arc::new(limits.clone()),
        tls: None,
    };
    let handler = Grpc(Echo(Arc::new(EchoSettings {
        limits,
        delay: arguments.delay,
        dies_of: arguments.dies_of,
        fails_on: arguments.fails_on,
        is_late: arguments.is_late,
    })));
    let listener = Listener::Tcp(bind(arguments.grpc_addr)?);
    let _admin = spawn_owned(admin::run(bind(arguments.admin_addr)?, metrics, health));
    let mut closing = drain.clone();
    let serving = server.run(listener, handler, drain);
    let ending = async {
        drain::termination().await?;
        trigger.drain(Duration::ZERO).await;
        closing.reached(Phase::Closing).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        Ok(())
    };
    tokio::select! {
        () = serving => Ok(()),
        ended = ending => ended,
    }
}

//! The gRPC door: every method that callers may use, and the way that its calls
//! take.

mod stream;

use std::sync::LazyLock;

use platform::grpc::{
    Call, MessageLimits, Metadata, Reply, code_name, decode, frame, head_code, reject, reply,
};
use platform::server::Handler;
use platform::telemetry::TraceParent;
use platform::{CommonServices, common_path};
use protocol::inference::{
    ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest, ServerReadyRequest,
    ServerReadyResponse,
};
use protocol::{Method, Task};
use tonic::Status;
use tracing::Instrument;

use crate::policy::Caller;
use crate::request::{Request, SelectorSource};
use crate::stack::{Access, CallRecord, Entered, Entry, EntryKind, Stack, rescue};

/// The name in metrics of methods that are not known: no caller creates a label.
const OTHER: &str = "other";

/// The limits of probes, whose messages are empty and whose senders are not
/// authenticated: they share no budget with other messages.
static PROBE_LIMITS: LazyLock<MessageLimits> = LazyLock::new(|| MessageLimits::new(1024, 16 << 20));

/// The most bytes of a message about the fleet, which carries no inputs.
const CONTROL_BYTES_MAX: usize = 64 << 10;

const TEXT_TASKS: &[Task] = &[Task::Embedding, Task::Classification, Task::Rerank];

/// Serves gRPC.
#[derive(Debug, Clone)]
pub struct GrpcDoor {
    /// Answers the calls.
    pub stack: Stack,
    /// Health and reflection.
    pub common: CommonServices,
}

/// How the gateway handles a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    /// Forwards its message to a model.
    Forward(SelectorSource),
    /// Forwards each message of its stream to a model.
    ForwardEach(SelectorSource),
    /// Gathers its stream into one message, and forwards that.
    Gather,
    /// Answers it for the whole fleet.
    Fleet(FleetMethod),
    /// Refuses it, for this reason.
    Unsupported(&'static str),
    /// Describes the services.
    Reflection,
    /// Answers health, and refuses unknown methods.
    Common,
}

/// The methods whose responses are about the whole fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FleetMethod {
    ServerLive,
    ServerReady,
    ServerMetadata,
    ModelReady,
    ModelStatistics,
    RepositoryIndex,
    RepositoryModelLoad,
    RepositoryModelUnload,
    TraceSetting,
    LogSettings,
}

impl Action {
    fn of(method: Option<Method>, path: &str) -> Self {
        let Some(method) = method else {
            let reflection = path.starts_with("/grpc.reflection.");
            return if reflection {
                Self::Reflection
            } else {
                Self::Common
            };
        };
        match method {
            Method::ModelInfer | Method::ModelMetadata | Method::ModelConfig => {
                Self::Forward(SelectorSource::Message)
            }
            Method::ModelStreamInfer => Self::ForwardEach(SelectorSource::Message),
            Method::Embed | Method::EmbedAll => {
                Self::Forward(SelectorSource::Metadata(&[Task::Embedding]))
            }
            Method::EmbedStream | Method::EmbedAllStream => {
                Self::ForwardEach(SelectorSource::Metadata(&[Task::Embedding]))
            }
            Method::Predict | Method::PredictPair => {
                Self::Forward(SelectorSource::Metadata(&[Task::Classification]))
            }
            Method::PredictStream | Method::PredictPairStream => {
                Self::ForwardEach(SelectorSource::Metadata(&[Task::Classification]))
            }
            Method::Rerank => Self::Forward(SelectorSource::Metadata(&[Task::Rerank])),
            Method::RerankStream => Self::Gather,
            Method::TeiInfo | Method::Tokenize | Method::Decode => {
                Self::Forward(SelectorSource::Metadata(TEXT_TASKS))
            }
            Method::TokenizeStream | Method::DecodeStream => {
                Self::ForwardEach(SelectorSource::Metadata(TEXT_TASKS))
            }
            // Between gateway and worker alone.
            Method::WatchReport => Self::Common,
            Method::ServerLive => Self::Fleet(FleetMethod::ServerLive),
            Method::ServerReady => Self::Fleet(FleetMethod::ServerReady),
            Method::ServerMetadata => Self::Fleet(FleetMethod::ServerMetadata),
            Method::ModelReady => Self::Fleet(FleetMethod::ModelReady),
            Method::ModelStatistics => Self::Fleet(FleetMethod::ModelStatistics),
            Method::RepositoryIndex => Self::Fleet(FleetMethod::RepositoryIndex),
            Method::RepositoryModelLoad => Self::Fleet(FleetMethod::RepositoryModelLoad),
            Method::RepositoryModelUnload => Self::Fleet(FleetMethod::RepositoryModelUnload),
            Method::TraceSetting => Self::Fleet(FleetMethod::TraceSetting),
            Method::LogSettings => Self::Fleet(FleetMethod::LogSettings),
            Method::EmbedSparse | Method::EmbedSparseStream => {
                Self::Unsupported(protocol::SPARSE_UNSUPPORTED)
            }
            Method::SystemSharedMemoryStatus
            | Method::SystemSharedMemoryRegister
            | Method::SystemSharedMemoryUnregister
            | Method::CudaSharedMemoryStatus
            | Method::CudaSharedMemoryRegister
            | Method::CudaSharedMemoryUnregister => {
                Self::Unsupported(protocol::SHARED_MEMORY_UNSUPPORTED)
            }
        }
    }
}

impl Action {
    /// How its calls enter the stack.
    fn entry_kind(self) -> EntryKind {
        match self {
            Self::Common
            | Self::Reflection
            | Self::Fleet(FleetMethod::ServerLive | FleetMethod::ServerReady) => EntryKind::Probe,
            Self::ForwardEach(_) => EntryKind::Stream,
            _ => EntryKind::Call,
        }
    }

    /// The access that it requires. Probes bring no credential, and unknown methods
    /// have the same error for every caller.
    fn access(self) -> Access {
        match self {
            Self::Reflection => Access::Reflection,
            Self::Common | Self::Fleet(FleetMethod::ServerLive | FleetMethod::ServerReady) => {
                Access::Open
            }
            Self::Fleet(
                FleetMethod::RepositoryModelLoad
                | FleetMethod::RepositoryModelUnload
                | FleetMethod::TraceSetting
                | FleetMethod::LogSettings,
            ) => Access::Administrator,
            _ => Access::Caller,
        }
    }
}

impl Handler for GrpcDoor {
    async fn handle(&self, call: Call) -> Reply {
        let layers = &self.stack.0;
        let method = Method::from_path(call.path());
        let path = method.map_or_else(|| common_path(call.path()), Method::path);
        let telemetry = &layers.telemetry;
        let span = telemetry.request_span(path, call.metadata(), TraceParent::Caller);
        let action = Action::of(method, call.path());
        let known = method.filter(|_| action != Action::Common);
        let name = known.map_or(OTHER, Method::name);
        let mut record = layers.metrics.begin(name, call.arrived);
        let reply = rescue(call.deadline, async {
            let entry = Entry {
                kind: action.entry_kind(),
                access: action.access(),
                headers: call.metadata(),
                peer: &call.peer,
            };
            let Entered { caller, guard } = self.stack.enter(entry).await?;
            let holder = match action.access() {
                Access::Open => call.peer.holder(),
                _ => caller.holder(),
            };
            let reply = match (action, method) {
                (Action::Forward(source), Some(method)) => {
                    let request = Request::read(call, method, &layers.limits, caller).await?;
                    self.forward(request, source, &mut record).await?
                }
                (Action::ForwardEach(source), Some(method)) => {
                    stream::forward_each(self.stack.clone(), call, &caller, method, source)?
                }
                (Action::Gather, _) => {
                    stream::gather(&self.stack, call, caller, &mut record).await?
                }
                (Action::Fleet(method), _) => self.fleet(method, call, &caller).await?,
                (Action::Unsupported(reason), _) => return Err(Status::unimplemented(reason)),
                _ => self.common.serve(call).await,
            };
            Ok::<_, Status>(reply.map(|body| body.guarded(guard).held_for(holder)))
        })
        .instrument(span)
        .await;
        let reply = reply.unwrap_or_else(|status| reject(&status));
        record.end(code_name(head_code(reply.headers())));
        reply
    }
}

impl GrpcDoor {
    /// Forwards a message to the model that it names.
    async fn forward(
        &self,
        request: Request,
        source: SelectorSource,
        record: &mut CallRecord,
    ) -> Result<Reply, Status> {
        let selector = request.selector(source)?;
        let plan = record.route(&self.stack, &selector, &request.caller)?;
        Ok(self.stack.run(&plan, &request).await?.into_reply())
    }

    /// Answers a call about the whole fleet.
    async fn fleet(
        &self,
        method: FleetMethod,
        call: Call,
        caller: &Caller,
    ) -> Result<Reply, Status> {
        let stack = &self.stack;
        let limits = &control_limits(&stack.0.limits, caller);
        let deadline = call.deadline;
        match method {
            FleetMethod::ServerLive => {
                unary(call, &PROBE_LIMITS, |_: ServerLiveRequest| async {
                    Ok(ServerLiveResponse { live: true })
                })
                .await
            }
            FleetMethod::ServerReady => {
                unary(call, &PROBE_LIMITS, |_: ServerReadyRequest| async {
                    Ok(ServerReadyResponse {
                        ready: stack.ready(),
                    })
                })
                .await
            }
            FleetMethod::ServerMetadata => {
                unary(call, limits, |_: ServerMetadataRequest| async {
                    Ok(stack.server_metadata())
                })
                .await
            }
            FleetMethod::ModelReady => {
                unary(call, limits, |request| async move {
                    stack.model_ready(&request, caller)
                })
                .await
            }
            FleetMethod::ModelStatistics => {
                unary(call, limits, |request| async move {
                    stack.statistics(&request, deadline, caller).await
                })
                .await
            }
            FleetMethod::RepositoryIndex => {
                unary(call, limits, |request| async move {
                    stack.index(&request, deadline, caller).await
                })
                .await
            }
            FleetMethod::RepositoryModelLoad => {
                unary(call, limits, |request| async move {
                    stack.load(&request, deadline).await
                })
                .await
            }
            FleetMethod::RepositoryModelUnload => {
                unary(call, limits, |request| async move {
                    stack.unload(&request, deadline).await
                })
                .await
            }
            FleetMethod::TraceSetting => {
                unary(call, limits, |request| async move { stack.trace(&request) }).await
            }
            FleetMethod::LogSettings => {
                unary(call, limits, |request| async move { stack.log(&request) }).await
            }
        }
    }
}

/// The limits of messages about the fleet: they are short, and decoded where they
/// arrive.
fn control_limits(limits: &MessageLimits, caller: &Caller) -> MessageLimits {
    let mut limits = limits.held_by(caller.holder());
    limits.message_bytes_max = limits.message_bytes_max.min(CONTROL_BYTES_MAX);
    limits
}

/// Answers a unary call about the fleet: one message in, one message out. Beyond
/// what platform's does, which knows no methods, it refuses a message with too
/// many parts before it decodes it, and encodes a long response on a thread for
/// work: a fleet may have thousands of models.
async fn unary<Q, A, F>(
    call: Call,
    limits: &MessageLimits,
    respond: impl FnOnce(Q) -> F,
) -> Result<Reply, Status>
where
    Q: prost::Message + Default,
    A: prost::Message + 'static,
    F: Future<Output = Result<A, Status>>,
{
    let method = Method::from_path(call.path());
    let message = call.into_messages(limits).only().await?;
    if let Some(method) = method {
        method.outline(&message.bytes())?;
    }
    let response = respond(decode(message.bytes())?).await?;
    let bytes = response.encoded_len();
    let framed = limits.work(bytes, move |_| frame(&response)).await?;
    Ok(reply(framed, Metadata::new()))
}

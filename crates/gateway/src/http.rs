//! The HTTP door: the same requests as the gRPC door's, in JSON.

use axum::Router;

use crate::stack::Stack;

/// What the HTTP port is held to.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct HttpSettings {
    /// Web pages of this origin may call; repeat for several, or * for all
    #[arg(long, value_name = "ORIGIN")]
    pub cors_origin: Vec<String>,
}

/// Every route of the door.
pub fn router(stack: Stack, _settings: &HttpSettings) -> Router {
    Router::new().with_state(stack)
}

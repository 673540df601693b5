//! Connections within the process, by which the roles of `andon serve` call each
//! other.

use std::io;

use tokio::io::DuplexStream;
use tokio::sync::mpsc;

/// The buffer of each direction of one connection, in bytes.
const PIPE_BYTES: usize = 1 << 20;
/// Connections that wait to be accepted.
const BACKLOG: usize = 16;

/// The connecting side.
#[derive(Debug, Clone)]
pub struct Connector(mpsc::Sender<DuplexStream>);

/// The listening side.
#[derive(Debug)]
pub struct Acceptor(mpsc::Receiver<DuplexStream>);

/// A connector, and the acceptor of its connections.
pub fn pair() -> (Connector, Acceptor) {
    let (sender, receiver) = mpsc::channel(BACKLOG);
    (Connector(sender), Acceptor(receiver))
}

impl Connector {
    /// Connects. An error when the acceptor was dropped.
    pub async fn connect(&self) -> io::Result<DuplexStream> {
        let (near, far) = tokio::io::duplex(PIPE_BYTES);
        self.0
            .send(far)
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
        Ok(near)
    }
}

impl Acceptor {
    /// The next connection; none when every connector was dropped.
    pub async fn accept(&mut self) -> Option<DuplexStream> {
        self.0.recv().await
    }
}

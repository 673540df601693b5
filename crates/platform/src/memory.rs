//! Connections that stay in the process: how the roles of `andon serve` meet.

use std::io;

use tokio::io::DuplexStream;
use tokio::sync::mpsc;

/// Bytes that may be under way in each direction of one connection.
const PIPE_BYTES: usize = 1 << 20;

/// The side that connects.
#[derive(Debug, Clone)]
pub struct Connector(mpsc::Sender<DuplexStream>);

/// The side that listens.
#[derive(Debug)]
pub struct Acceptor(mpsc::Receiver<DuplexStream>);

/// A connector and the acceptor that its connections arrive at.
pub fn pair() -> (Connector, Acceptor) {
    let (sender, receiver) = mpsc::channel(16);
    (Connector(sender), Acceptor(receiver))
}

impl Connector {
    /// Connects; refused when the acceptor is gone.
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
    /// The next connection; none when every connector is gone.
    pub async fn accept(&mut self) -> Option<DuplexStream> {
        self.0.recv().await
    }
}

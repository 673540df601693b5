//! The other end of a connection.

use std::net::SocketAddr;

use crate::pot::Holder;
use crate::seats::Occupant;

/// The other end of a connection.
#[derive(Debug, Default)]
pub struct Peer {
    /// Its socket address; none in the same process.
    pub address: Option<SocketAddr>,
    /// The subject names of its verified certificate: URIs, then DNS names; the
    /// common name where it has neither.
    pub certificate_names: Vec<String>,
    /// The state of the connection.
    pub connection: ConnectionState,
}

/// What the calls of a connection share.
#[derive(Debug, Clone, Default)]
pub struct ConnectionState(pub(crate) Occupant);

impl Peer {
    /// The peer as a holder of what is shared, where nobody asks who it is.
    pub fn holder(&self) -> Holder {
        self.address
            .map_or(Holder::Own, |address| Holder::peer(address.ip()))
    }
}

//! A Redis of a test's own: Debian's server on a port that was free and in a
//! folder of its own, killed when it is dropped. The service that the package
//! may start is left running.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::{free_port, scratch, send};
use crate::until;

/// A running Redis.
#[derive(Debug)]
pub struct Redis {
    child: Option<Child>,
    /// Where it serves.
    pub address: SocketAddr,
    folder: PathBuf,
    password: Option<String>,
}

impl Redis {
    /// One that responds.
    pub async fn start() -> Result<Self> {
        Self::with(None).await
    }

    /// One that requires a password.
    pub async fn with(password: Option<&str>) -> Result<Self> {
        let folder = scratch("redis")?;
        std::fs::create_dir_all(&folder)?;
        let mut redis = Self {
            child: None,
            address: free_port()?,
            folder,
            password: password.map(str::to_owned),
        };
        redis.again().await?;
        Ok(redis)
    }

    /// The settings for a gateway.
    pub fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// Starts it again where it was, empty.
    pub async fn again(&mut self) -> Result<()> {
        let (port, folder) = (self.address.port(), self.folder.display());
        let mut settings = format!(
            "bind 127.0.0.1\nport {port}\ndir \"{folder}\"\nsave \"\"\nappendonly no\ndaemonize no\n"
        );
        if let Some(password) = &self.password {
            settings += &format!("requirepass {password}\n");
        }
        let started = Command::new("redis-server")
            .arg("-")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut child = match started {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                bail!("redis-server is missing: install the Debian package redis-server")
            }
            started => started.context("redis-server cannot be started")?,
        };
        let input = child.stdin.take();
        self.child = Some(child);
        // It begins when its settings end.
        let mut input = input.context("redis-server takes no settings")?;
        input.write_all(settings.as_bytes())?;
        drop(input);
        let address = self.address;
        until(Duration::from_secs(20), "Redis responds", || async move {
            tokio::task::spawn_blocking(move || responds(address)).await?
        })
        .await
    }

    /// Sends a signal, for example `libc::SIGSTOP`.
    pub fn signal(&self, signal: i32) -> Result<()> {
        send(self.child.as_ref().context("Redis does not run")?, signal)
    }

    /// Kills it; what it held is lost.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }
}

fn responds(address: SocketAddr) -> Result<bool> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.write_all(b"PING\r\n")?;
    let mut first = [0; 1];
    stream.read_exact(&mut first)?;
    // Asking for the password is a response too.
    Ok(first == *b"+" || first == *b"-")
}

impl Drop for Redis {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.kill();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

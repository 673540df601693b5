//! Tasks that end with their owner.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::task::JoinHandle;

/// A task that is aborted when this handle is dropped.
#[derive(Debug)]
pub struct Owned(JoinHandle<()>);

impl Owned {
    /// Ends the task now.
    pub fn abort(&self) {
        self.0.abort();
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Starts a task that ends when the returned handle is dropped.
#[must_use = "the task ends when its handle is dropped"]
#[allow(
    clippy::disallowed_methods,
    reason = "the handle owns the task: it is not detached"
)]
pub fn owned(future: impl Future<Output = ()> + Send + 'static) -> Owned {
    Owned(tokio::task::spawn(future))
}

/// A task whose result is awaited, and which is aborted when this is dropped.
#[derive(Debug)]
pub struct Awaited<T>(JoinHandle<T>);

impl<T> Drop for Awaited<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<T> Future for Awaited<T> {
    /// None when the task panicked.
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        Pin::new(&mut self.0).poll(context).map(Result::ok)
    }
}

/// Starts a task that runs whether its result is being polled or not.
#[allow(
    clippy::disallowed_methods,
    reason = "the returned handle owns the task: it is not detached"
)]
pub fn awaited<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> Awaited<T> {
    Awaited(tokio::task::spawn(future))
}

/// Runs the streams and connections that hyper hands over. Each is bounded by
/// its connection, which its accept loop owns.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionExecutor;

impl<F> hyper::rt::Executor<F> for ConnectionExecutor
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    #[allow(
        clippy::disallowed_methods,
        reason = "hyper drops the stream's future when its connection ends"
    )]
    fn execute(&self, future: F) {
        drop(tokio::task::spawn(future));
    }
}

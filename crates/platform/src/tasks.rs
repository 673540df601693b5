//! Tasks that end with their owner.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};

use tokio::runtime::Handle;
use tokio::task::{JoinHandle, JoinSet};

/// A task that is aborted when this handle is dropped. Awaiting the handle
/// gives the task's output.
#[derive(Debug)]
pub struct OwnedTask<T = ()>(JoinHandle<T>);

impl<T> OwnedTask<T> {
    /// Ends the task now.
    pub fn abort(&self) {
        self.0.abort();
    }
}

impl<T> Drop for OwnedTask<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<T> Future for OwnedTask<T> {
    /// None when the task panicked or was aborted.
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        Pin::new(&mut self.0).poll(context).map(Result::ok)
    }
}

/// Starts a task that ends when the returned handle is dropped.
#[must_use = "the task ends when its handle is dropped"]
#[allow(
    clippy::disallowed_methods,
    reason = "the handle owns the task: it is not detached"
)]
pub fn spawn_owned<T: Send + 'static>(
    future: impl Future<Output = T> + Send + 'static,
) -> OwnedTask<T> {
    OwnedTask(tokio::task::spawn(future))
}

/// Owns the tasks that its handles start: they are aborted when it is dropped.
#[derive(Debug)]
pub struct TaskScope(Arc<ScopeState>);

#[derive(Debug)]
struct ScopeState {
    runtime: Handle,
    tasks: Mutex<JoinSet<()>>,
}

/// Starts tasks in a scope. Cheap to clone; starts nothing once the scope has
/// ended.
#[derive(Debug, Clone)]
pub struct ScopeHandle(Weak<ScopeState>);

impl TaskScope {
    /// A scope whose tasks run on this runtime.
    pub fn new(runtime: Handle) -> Self {
        Self(Arc::new(ScopeState {
            runtime,
            tasks: Mutex::default(),
        }))
    }

    /// A handle that starts tasks in this scope.
    pub fn handle(&self) -> ScopeHandle {
        ScopeHandle(Arc::downgrade(&self.0))
    }
}

impl ScopeHandle {
    /// Starts a task that ends with the scope, from any thread.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        let Some(scope) = self.0.upgrade() else {
            return;
        };
        let mut tasks = scope.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(future, &scope.runtime);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tasks_end_with_their_owner() {
        // The sender is dropped with the task that owns it.
        let (sender, mut receiver) = tokio::sync::mpsc::channel::<()>(1);
        let scope = TaskScope::new(Handle::current());
        let handle = scope.handle();
        for sender in [sender.clone(), sender.clone()] {
            handle.spawn(async move {
                sender.closed().await;
            });
        }
        let task = spawn_owned(async move {
            sender.closed().await;
        });
        drop(scope);
        handle.spawn(async {});
        drop(task);
        assert_eq!(receiver.recv().await, None);
    }
}

//! Where the migration hooks into a container's life, without the Task service knowing of it.

use std::{future::Future, pin::Pin, sync::Arc};

use crate::container::Container;

/// What [`Hooks::abandon`] returns.
pub type Abandoned = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Called by the service on the runtime's thread; must not block.
pub trait Hooks: Send + Sync {
    /// The container exists from now on (fresh, from a checkpoint, or incoming and still without a process), and is in the service's table.
    fn created(&self, container: &Arc<Container>);

    /// A container that has not arrived yet is about to be deleted: ends its migration, and waits until that has undone what it did. It may
    /// have arrived then, if the end came too late.
    fn abandon(&self, container: &Arc<Container>) -> Abandoned;

    /// The container is gone: runc's state is deleted, the root unmounted. Also called for an incoming container whose migration
    /// never completed.
    fn deleted(&self, container: &Arc<Container>);
}

/// No hooks: what a shim without migrations has, and what unit tests use.
#[cfg(test)]
pub struct NoHooks;

#[cfg(test)]
impl Hooks for NoHooks {
    fn created(&self, _: &Arc<Container>) {}
    fn abandon(&self, _: &Arc<Container>) -> Abandoned {
        Box::pin(std::future::ready(()))
    }
    fn deleted(&self, _: &Arc<Container>) {}
}

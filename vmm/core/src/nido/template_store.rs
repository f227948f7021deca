//! Access to the store of templates, and the lock that keeps its parts.

use std::fs::File;
use std::time::{Duration, Instant};

use nido_api::error::{Code, Error, Result};
use nido_files::flock::{Flock, Mode};
use nido_images::{ImageError, Store as ImageStore};

use super::Nido;

/// How long to wait for operations that make or remove something of templates.
pub(super) const TEMPLATES_LOCK_TIMEOUT: Duration = Duration::from_secs(600);

impl Nido {
    pub(super) fn images(&self) -> ImageStore {
        ImageStore::new(self.home().root())
    }

    /// Keeps template parts from being removed while a VM that needs them is being made.
    pub(super) async fn templates_shared(&self) -> Result<Flock> {
        self.templates_lock(Mode::Shared, TEMPLATES_LOCK_TIMEOUT).await
    }

    /// Keeps other processes from making or using anything of templates.
    pub(super) async fn templates_exclusive(&self, timeout: Duration) -> Result<Flock> {
        self.templates_lock(Mode::Exclusive, timeout).await
    }

    /// Waits without blocking the thread: another request of this process may hold the lock.
    async fn templates_lock(&self, mode: Mode, timeout: Duration) -> Result<Flock> {
        let path = self.home().templates_lock();
        let broken = |e| Error::io("cannot lock the templates", e);
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(broken)?;
        let taken = Flock::take(file, mode, Instant::now() + timeout).await.map_err(broken)?;
        taken.ok_or_else(|| Error::new(Code::VmBusy, "the templates are being worked on").hint("try again later"))
    }

    /// Works on the images on a thread of its own: another process may hold their store for minutes.
    pub(super) async fn with_images<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ImageStore) -> Result<T, ImageError> + Send + 'static,
    ) -> Result<T, ImageError> {
        let images = self.images();
        match tokio::task::spawn_blocking(move || work(&images)).await {
            Ok(done) => done,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

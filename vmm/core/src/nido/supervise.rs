//! The hidden verb `supervise`.

use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nido_api::error::Result;
use nido_supervisor::{SuperviseRequest, supervise};

use super::{Nido, OpenOptions};

impl Nido {
    /// Supervises one VM and returns when it has stopped; at once if it does not run, or has a supervisor.
    ///
    /// # Errors
    /// Any failure to supervise. The VM's row states how the VM ended.
    pub async fn supervise(options: OpenOptions, request: SuperviseRequest) -> Result<()> {
        let supervised = Self::supervise_one(options, request).await;
        if let Err(error) = &supervised {
            // Before the supervisor listens, standard output leads to the command that started it; afterwards to nowhere.
            if let Ok(record) = serde_json::to_string(&error.record()) {
                let _ = writeln!(std::io::stdout(), "{record}");
            }
        }
        supervised
    }

    async fn supervise_one(options: OpenOptions, request: SuperviseRequest) -> Result<()> {
        let asked_at =
            Instant::now().checked_sub(Duration::from_secs_f64(request.asked_ms_ago.clamp(0.0, 1e9) / 1000.0));
        let nido = Self::open_unreconciled(options)?;
        let supervised = Box::pin(supervise(Arc::clone(nido.context()), request, asked_at)).await;
        // The VM may have been the last that used a part. By now no command waits for this process.
        nido.remove_unowned_parts_if_due().await;
        supervised
    }
}

//! What all requests to QEMU's monitor share.

use std::time::Duration;

use nido_api::error::{Code, Error};
use nido_api::sanitize::on_one_line;
use nido_engine::qemu::MonitorError;

/// How long any QMP command may take.
pub(super) const QMP_TIMEOUT: Duration = Duration::from_secs(10);

/// A request that failed, as an error of the API.
pub(super) fn qmp_error(error: &MonitorError) -> Error {
    Error::new(Code::QemuFailed, on_one_line(&error.to_string()))
}

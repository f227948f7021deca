//! What all requests to QEMU's monitor share.

use std::time::Duration;

use crate::error::{Code, Error};
use crate::qemu::MonitorError;
use crate::text::on_one_line;

/// How long any QMP command may take.
pub(super) const QMP_TIMEOUT: Duration = Duration::from_secs(10);

/// A request that failed, as an error of the API.
pub(super) fn qmp_error(error: &MonitorError) -> Error {
    Error::new(Code::QemuFailed, on_one_line(&error.to_string()))
}

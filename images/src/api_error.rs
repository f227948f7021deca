//! Failures of this crate as errors of the API: which code each has, and what to do about it.

use nido_api::error::host::{HostRefusal, Subject};
use nido_api::error::{Code, Error};

use crate::error::ImageError;

impl From<ImageError> for Error {
    fn from(error: ImageError) -> Self {
        let code = match &error {
            ImageError::MissingTool { .. } => Code::ToolMissing,
            ImageError::Unprivileged { .. } => Code::Denied,
            ImageError::RecipeNotFound { .. } | ImageError::TemplateNotFound { .. } => Code::TemplateNotFound,
            ImageError::NameInvalid { .. } => Code::NameInvalid,
            ImageError::TemplateExists { .. } => Code::TemplateExists,
            ImageError::ArchiveRefused { .. } => Code::ArchiveInvalid,
            ImageError::AgentProtocol { .. } => Code::AgentVersion,
            ImageError::NotExportable { .. } => Code::LimitExceeded,
            ImageError::PathExists { .. } => Code::PathExists,
            ImageError::PathInvalid { .. } | ImageError::BuildDirectory { .. } => Code::PathInvalid,
            ImageError::TemplateChanged { .. } => Code::VmBusy,
            ImageError::ManifestInvalid { .. } | ImageError::Damaged { .. } | ImageError::ImageRefused { .. } => {
                Code::TemplateMismatch
            }
            ImageError::DiskFull { .. } => Code::DiskFull,
            ImageError::Interrupted => Code::Interrupted,
            ImageError::Io { source, .. } => HostRefusal::of(source).code(),
            _ => Code::TemplateBuildFailed,
        };
        let tail = match &error {
            ImageError::Command { tail, .. } => tail.clone(),
            _ => Vec::new(),
        };
        let wrapped = Error::new(code, error.to_string()).log_tail(tail);
        let refused = match &error {
            ImageError::Io { source, .. } => HostRefusal::of(source).hint(Subject::Home),
            _ => None,
        };
        error.hint().or(refused).into_iter().fold(wrapped, Error::or_hint).because(error)
    }
}

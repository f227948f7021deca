//! Files of a VM, streamed both ways; directories as tar archives.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use axum::body::{Body as Stream, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Method, header};
use axum::response::IntoResponse;
use futures::{StreamExt, TryStreamExt, stream};
use nido_api::error::{Code, Error, Result};
use nido_api::{CopyResult, DownloadRequest, DownloadTarget, UploadRequest, UploadSource};
use nido_core::execute::Verdict;
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio_util::io::ReaderStream;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::vms::VmPath;
use crate::extract::PathParams;
use crate::media_type::{media_type, prefers};
use crate::operations::OperationContext;
use crate::query::{GuestPathParam, switch};
use crate::response::{self, HandlerResult};
use crate::{App, audit_entry, timeouts};

/// How much of a download is read at once, in bytes.
const PIECE: usize = 64 * 1024;
/// The bytes of a file.
const BYTES: &str = "application/octet-stream";
/// A directory.
const TAR: &str = "application/x-tar";

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(download, upload))
        // The limit is for JSON; a file is as long as it is, and is never kept in memory.
        .layer(axum::extract::DefaultBodyLimit::disable())
}

/// A file to read.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct DownloadQuery {
    /// Absolute path in the guest. Encode bytes that are not UTF-8 as `%XX`; a plus is a plus.
    #[param(pattern = "^/[^\\u0000]*$", example = "/etc/os-release")]
    #[serde(rename = "path")]
    _path: String,
}

/// A file to write.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct UploadQuery {
    /// Absolute path in the guest. Encode bytes that are not UTF-8 as `%XX`; a plus is a plus.
    #[param(pattern = "^/[^\\u0000]*$", example = "/srv/data.bin")]
    #[serde(rename = "path")]
    _path: String,
    /// Permission bits, in octal. If absent, an existing file keeps its own, and a new one gets 644. An archive has
    /// those of its entries.
    #[param(pattern = "^[0-7]{3,4}$", example = "644")]
    mode: Option<String>,
    /// Owner. If absent, an existing file keeps its owner, and a new one belongs to root.
    user: Option<String>,
    /// Create missing parent directories.
    #[serde(default, deserialize_with = "switch")]
    parents: bool,
}

/// Reads a file of the guest; with `Accept: application/x-tar` a directory, as a tar archive whose entries are named
/// `./PATH`.
#[utoipa::path(get, path = "/v1/vms/{name}/files", operation_id = "vm_download", tag = "files", params(VmPath, DownloadQuery),
    responses((status = 200, description = "The bytes of the file, or the archive.", content(
        ([u8] = "application/octet-stream"),
        ([u8] = "application/x-tar")))))]
async fn download(
    State(app): State<Arc<App>>,
    PathParams(vm): PathParams<VmPath>,
    GuestPathParam(path, _): GuestPathParam<DownloadQuery>,
    method: Method,
    context: OperationContext,
) -> HandlerResult {
    let source = guest_path(path)?;
    let kind = if prefers(context.headers(), TAR, BYTES) { TAR } else { BYTES };
    app.nido().await?;
    let (writer, reader) = pipe()?;
    let reader = pipe::Receiver::from_file(File::from(reader)).map_err(broken)?;
    let owner = Arc::clone(&app);
    let copying = tokio::spawn(async move {
        let writer = File::from(writer);
        let destination = if kind == TAR { DownloadTarget::Archive(writer) } else { DownloadTarget::Stream(writer) };
        let request = DownloadRequest { source, destination, overwrite: false, preserve: false, max_bytes: None };
        owner.nido.download(&vm.name, request, &mut |_| ()).await
    });
    // An error before the first byte is a problem; one behind it breaks the response off, which a client sees.
    let mut bytes = ReaderStream::with_capacity(reader, PIECE);
    let first = bytes.next().await;
    let typed = |body: Stream| {
        let mut response = body.into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        Ok(response)
    };
    if first.is_none() {
        joined(copying.await)?;
        return typed(Stream::empty());
    }
    let counter = Arc::clone(&app);
    let rest = stream::iter(first).chain(bytes).inspect_ok(move |piece| counter.metrics.bytes_out(piece.len() as u64));
    // Its line ends with the response's last byte; if the client disconnects before that, the line records the interruption. Of a HEAD nothing
    // follows, and no client reads on.
    let line = if method == Method::HEAD { None } else { Some(context.take_attempt()?) };
    let end = stream::once(async move {
        let outcome = joined(copying.await);
        audit_entry::end(line, &Verdict::of(&outcome));
        outcome.map(|_| Bytes::new()).map_err(std::io::Error::other)
    });
    typed(Stream::from_stream(rest.chain(end)))
}

/// Writes a file of the guest; it appears under its name when it is complete. An archive (`application/x-tar`) is
/// unpacked into a directory: a new directory appears when it is complete; in an existing one, each file is written
/// separately. Owners are ignored, modes masked to the nine permission bits, devices and pipes skipped. Hard links,
/// sparse files, and names that are absolute or contain `..` are rejected.
#[utoipa::path(put, path = "/v1/vms/{name}/files", operation_id = "vm_upload", tag = "files", params(VmPath, UploadQuery),
    request_body(description = "The bytes of a file, or an archive.", content(
        ([u8] = "application/octet-stream"),
        ([u8] = "application/x-tar"))),
    responses((status = 200, body = CopyResult)))]
async fn upload(
    State(app): State<Arc<App>>,
    PathParams(vm): PathParams<VmPath>,
    GuestPathParam(path, to): GuestPathParam<UploadQuery>,
    headers: HeaderMap,
    body: Stream,
) -> HandlerResult {
    let is_archive = match media_type(&headers).as_deref() {
        None | Some(BYTES) => false,
        Some(TAR) => true,
        Some(_) => {
            let words = "a file is sent as application/octet-stream, a directory as application/x-tar";
            return Err(Error::new(Code::MediaTypeUnsupported, words).into());
        }
    };
    if is_archive && to.mode.is_some() {
        return Err(Error::new(Code::SpecInvalid, "mode: not for an archive, whose entries have their own").into());
    }
    let set_mode = to.mode.is_some();
    let mode = permissions(to.mode.as_deref().unwrap_or("644"))?;
    let destination = guest_path(path)?;
    let nido = app.nido().await?;
    let (writer, reader) = pipe()?;
    let mut writer = pipe::Sender::from_file(File::from(writer)).map_err(broken)?;
    let file = File::from(reader);
    let source = if is_archive { UploadSource::Archive(file) } else { UploadSource::Stream { file, mode } };
    let request = UploadRequest { source, destination, user: to.user, parents: to.parents, preserve: false, set_mode };
    let mut pieces = body.into_data_stream();
    let sending = async {
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|error| timeouts::body_error(&error))?;
            app.metrics.bytes_in(piece.len() as u64);
            // The copy has ended, and has the reason.
            if writer.write_all(&piece).await.is_err() {
                return Ok(());
            }
        }
        Ok::<_, Error>(())
    };
    let mut no_progress = |_| ();
    let mut copying = std::pin::pin!(nido.upload(&vm.name, request, &mut no_progress));
    let sent = tokio::select! {
        copied = &mut copying => return response::ok(&copied?),
        sent = sending => sent,
    };
    // A body that breaks off must not look like its end: the pipe stays open until the copy is dropped, which leaves nothing
    // in the guest.
    sent?;
    drop(writer);
    response::ok(&copying.await?)
}

fn permissions(text: &str) -> Result<u16> {
    let mode = u16::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| Error::new(Code::SpecInvalid, "mode: not permission bits in octal"))
}

fn guest_path(path: Vec<u8>) -> Result<Vec<u8>> {
    if path.starts_with(b"/") && !path.contains(&0) {
        return Ok(path);
    }
    Err(Error::new(Code::PathInvalid, "path: not an absolute path in the guest, or it contains a zero byte"))
}

fn joined(outcome: std::result::Result<Result<CopyResult>, tokio::task::JoinError>) -> Result<CopyResult> {
    outcome.map_err(|e| Error::internal(format!("the copy failed: {e}")))?
}

/// A pipe: its writing and its reading end.
fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let flags = rustix::pipe::PipeFlags::CLOEXEC;
    let (reader, writer) = rustix::pipe::pipe_with(flags).map_err(|e| broken(e.into()))?;
    Ok((writer, reader))
}

fn broken(error: std::io::Error) -> Error {
    Error::io("cannot make a pipe", error)
}

//! Files of a VM, streamed both ways.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use axum::body::{Body as Stream, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::IntoResponse;
use futures::{StreamExt, TryStreamExt, stream};
use nido_vmm::api::{CopyResult, DownloadRequest, DownloadTarget, UploadRequest, UploadSource};
use nido_vmm::error::{Code, Error, Result};
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio_util::io::ReaderStream;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::vms::Vm;
use crate::serve::App;
use crate::serve::answer::{self, Answer};
use crate::serve::ask::{Names, Query, media_type};
use crate::serve::guard::Uses;

/// How much of a download is read at once, in bytes.
const PIECE: usize = 64 * 1024;

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(download, upload))
        // The limit is for JSON; a file is as long as it is, and is never kept in memory.
        .layer(axum::extract::DefaultBodyLimit::disable())
}

/// Which file.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Where {
    /// Its path in the guest, absolute.
    #[param(pattern = "^/[^\\u0000]*$", example = "/etc/os-release")]
    path: String,
}

/// Where a file goes to.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct To {
    /// Its path in the guest, absolute.
    #[param(pattern = "^/[^\\u0000]*$", example = "/srv/data.bin")]
    path: String,
    /// Its permission bits, in octal.
    #[param(pattern = "^[0-7]{3,4}$", example = "644")]
    mode: Option<String>,
    /// Who shall own it; root if absent.
    user: Option<String>,
    /// Make missing parent directories.
    #[serde(default)]
    parents: bool,
}

/// Reads a file of the guest.
#[utoipa::path(get, path = "/v1/vms/{name}/files", operation_id = "vm_download", tag = "files", params(Vm, Where),
    responses((status = 200, description = "The bytes.", content_type = "application/octet-stream", body = [u8])))]
async fn download(State(app): State<Arc<App>>, _: Uses, Names(vm): Names<Vm>, Query(at): Query<Where>) -> Answer {
    let source = guest_path(&at.path)?;
    app.nido().await?;
    let (writer, reader) = pipe()?;
    let reader = pipe::Receiver::from_file(File::from(reader)).map_err(broken)?;
    let owner = Arc::clone(&app);
    let mut copying = tokio::spawn(async move {
        let request = DownloadRequest {
            source,
            destination: DownloadTarget::Stream(File::from(writer)),
            overwrite: false,
            max_bytes: None,
        };
        owner.nido.download(&vm.name, request, &mut |_| ()).await
    });
    // An error before the first byte is a problem; one behind it breaks the answer off, which a client sees.
    let mut bytes = ReaderStream::with_capacity(reader, PIECE);
    let first = bytes.next().await;
    if first.is_none() {
        joined((&mut copying).await)?;
    }
    let counter = Arc::clone(&app);
    let rest = stream::iter(first).chain(bytes).inspect_ok(move |piece| counter.metrics.bytes_out(piece.len() as u64));
    let end = stream::once(async move { joined(copying.await).map(|_| Bytes::new()).map_err(std::io::Error::other) });
    let mut response = Stream::from_stream(rest.chain(end)).into_response();
    let kind = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}

/// Writes a file of the guest. It appears under its name when it is whole.
#[utoipa::path(put, path = "/v1/vms/{name}/files", operation_id = "vm_upload", tag = "files", params(Vm, To),
    request_body(content = [u8], content_type = "application/octet-stream", description = "The bytes."),
    responses((status = 200, body = CopyResult)))]
async fn upload(
    State(app): State<Arc<App>>,
    _: Uses,
    Names(vm): Names<Vm>,
    Query(to): Query<To>,
    headers: HeaderMap,
    body: Stream,
) -> Answer {
    if media_type(&headers).is_some_and(|kind| kind != "application/octet-stream") {
        return Err(Error::new(Code::MediaTypeUnsupported, "a file is sent as application/octet-stream").into());
    }
    let bad = || Error::new(Code::SpecInvalid, "mode: not permission bits in octal");
    let mode = to.mode.map_or(Ok(0o644), |text| u16::from_str_radix(&text, 8).map_err(|_| bad()))?;
    if mode > 0o777 {
        return Err(bad().into());
    }
    let destination = guest_path(&to.path)?;
    let nido = app.nido().await?;
    let (writer, reader) = pipe()?;
    let mut writer = pipe::Sender::from_file(File::from(writer)).map_err(broken)?;
    let source = UploadSource::Stream { file: File::from(reader), mode };
    let request = UploadRequest { source, destination, user: to.user, parents: to.parents };
    let mut pieces = body.into_data_stream();
    let sending = async {
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|_| Error::new(Code::Interrupted, "the client has hung up"))?;
            app.metrics.bytes_in(piece.len() as u64);
            // The copy has ended, and says why.
            if writer.write_all(&piece).await.is_err() {
                return Ok(());
            }
        }
        Ok::<_, Error>(())
    };
    let mut no_progress = |_| ();
    let mut copying = std::pin::pin!(nido.upload(&vm.name, request, &mut no_progress));
    let sent = tokio::select! {
        copied = &mut copying => return answer::ok(&copied?),
        sent = sending => sent,
    };
    // A body that breaks off must not look like its end: the pipe stays open until the copy is dropped, which leaves nothing
    // in the guest.
    sent?;
    drop(writer);
    answer::ok(&copying.await?)
}

fn guest_path(path: &str) -> Result<Vec<u8>> {
    if path.starts_with('/') && !path.contains('\0') {
        return Ok(path.as_bytes().to_vec());
    }
    Err(Error::new(Code::PathInvalid, "path: it is not an absolute path in the guest"))
}

fn joined(outcome: std::result::Result<Result<CopyResult>, tokio::task::JoinError>) -> Result<CopyResult> {
    outcome.map_err(|e| Error::internal(format!("the copy broke down: {e}")))?
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

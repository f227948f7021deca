//! Has the guest trust the VM's certificate authority: in the bundles that distributions use, and by the hash of its name.
//!
//! Invariant: it may be done again at any time; the authority of another VM (of which this one is a copy) is replaced.

use nido_engine::guest::{Event, GuestError, Session};
use nido_guest_agent::wire::Exec;
use tokio::time::Instant;

use super::readiness::{AgentRoute, Readiness};

/// How long the guest may take, in milliseconds.
const TIMEOUT_MS: u64 = 30_000;
/// How much of its complaint is kept, in bytes.
const COMPLAINT_MAX: usize = 400;
/// `$1` is the certificate. `ffc87da0` is the hash of its subject, by which OpenSSL finds it.
const SCRIPT: &str = r#"
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
umask 022
own=/usr/local/share/ca-certificates/nido.crt
mkdir -p "${own%/*}" /etc/ssl/certs
printf '%s' "$1" > "$own.new"
mv -f "$own.new" "$own"
ln -sf "$own" /etc/ssl/certs/ffc87da0.0
for bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do
    [ -e "$bundle" ] || [ "$bundle" = /etc/ssl/certs/ca-certificates.crt ] || continue
    bundle=$(readlink -f "$bundle")
    base=$bundle
    [ -e "$base" ] || base=/etc/pki/tls/certs/ca-bundle.crt
    {
        if [ -e "$base" ]; then sed '/^# nido begin$/,/^# nido end$/d' "$base"; fi
        printf '# nido begin\n%s\n# nido end\n' "$1"
    } > "$bundle.nido"
    mv -f "$bundle.nido" "$bundle"
done
"#;

/// Has the guest trust this certificate. Returns why it is not ready if it does not; a guest that was ready before has the
/// certificate already.
pub(super) async fn install(
    route: &AgentRoute,
    certificate: &str,
    was_ready: bool,
    deadline: Instant,
) -> Option<Readiness> {
    let complaint = run(route, certificate, deadline).await.unwrap_or_else(|error| Err(error.to_string())).err()?;
    let why = format!("the guest did not install the certificate for its secrets: {complaint}");
    tracing::warn!("{why}");
    (!was_ready).then_some(Readiness::NotRenewed(why))
}

async fn run(route: &AgentRoute, certificate: &str, deadline: Instant) -> Result<Result<(), String>, GuestError> {
    let session = Session::open(route.stream(deadline).await?, route.guest.token(), deadline).await?;
    let argv = ["sh", "-c", SCRIPT, "nido", certificate].map(|word| word.as_bytes().to_vec().into()).to_vec();
    let request = Exec { argv, timeout_ms: Some(TIMEOUT_MS), ..Exec::default() };
    let mut running = session.exec(request, deadline).await?;
    let mut complaint = Vec::new();
    while let Some(event) = running.events.next().await? {
        match event {
            Event::Stdout(_) => {}
            Event::Stderr(bytes) => complaint.extend(bytes.into_iter().take(COMPLAINT_MAX - complaint.len())),
            Event::Exited(exited) if exited.code == Some(0) => return Ok(Ok(())),
            Event::Exited(_) => break,
        }
    }
    Ok(Err(nido_api::sanitize::on_one_line(&String::from_utf8_lossy(&complaint))))
}

//! The control protocol: what commands and the supervisor send each other over the control socket. The only place where its
//! messages are defined.
//!
//! ```text
//!  command    {"version":2,"op":"stop","force":false,"timeout_ms":30000}     one line
//!  supervisor {"version":2,"answer":"stage",...} ... {"version":2,"answer":"done"}     lines; the last one ends it
//! ```
//!
//! The two ends may be of different nidos: a supervisor keeps running while nido is upgraded, and a command of the older nido
//! may still run then. Version 1 had no `version` in its messages. A supervisor replies in the version of the request, and to a
//! request that it does not know with [`Reply::Unsupported`] (in version 1: with `failed`). Types of messages are tolerant:
//! unknown fields are ignored, and missing ones have a default. They are apart from the types of the API, which are strict.
//!
//! A connection that asked for a [`Request::Lease`] counts as activity for as long as it stays open: the kernel closes it
//! when its holder ends, so no lease outlives a killed client.

mod claim_command;

use std::net::IpAddr;

use nido_api::egress::NetworkInfo;
use nido_api::error::{Code, Error, ErrorRecord, Result};
use nido_api::name::SnapshotName;
use nido_api::{ForwardSpec, StartStage, StopRequest};
use nido_images::Bake;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::claim_command::{ClaimCommand, VmOrder};

/// The version of this nido's messages.
pub const VERSION: u32 = 2;
/// The version of messages without one.
pub const UNVERSIONED: u32 = 1;
/// Longest line either side accepts, in bytes.
pub const MAX_LINE: usize = 64 * 1024;
/// How a supervisor of version 1 begins its reply to a request that it cannot read.
const NOT_A_REQUEST: &str = "not a request to a supervisor";

/// What a command requests of a supervisor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Reports when the agent is ready, or why it will not be. The replies are stages on the way.
    Ready,
    /// Stops the VM; the reply follows when QEMU has ended and the store has recorded it.
    Stop(StopCommand),
    /// Terminates QEMU and keeps the VM, even an ephemeral one: it is about to be restored. Same reply as for a stop.
    StopKept,
    /// Pauses the CPUs.
    Pause,
    /// Resumes the CPUs.
    Resume,
    /// Takes a snapshot; the reply follows when it is whole.
    Snapshot {
        /// Its name.
        name: SnapshotName,
        /// The VM that gets it, if it is not this one: a VM of the same home, by its id.
        into: Option<String>,
    },
    /// Counts as activity until this connection closes.
    Lease,
    /// Listens on a port of the host.
    ForwardAdd {
        /// Which; a host port of 0 takes a free one.
        forward: ForwardCommand,
    },
    /// Stops listening.
    ForwardRemove {
        /// Which.
        forward: ForwardCommand,
    },
    /// Applies the rules of the network that the store has now. The reply follows when nothing else is allowed any more.
    ApplyRules,
    /// Claims a clone that waits in a pool. The replies are stages, the first one when it has been claimed.
    Claim(Box<ClaimCommand>),
    /// Deletes an unclaimed clone; the reply follows when it is deleted.
    Retire,
    /// Reports for how long the VM has been idle, and what its network has done.
    Status,
}

/// How a VM is to be stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StopCommand {
    /// Terminate QEMU at once.
    pub force: bool,
    /// Time limit for the guest to power off, in milliseconds.
    pub timeout_ms: u64,
}

impl Default for StopCommand {
    fn default() -> Self {
        StopRequest::default().into()
    }
}

impl From<StopRequest> for StopCommand {
    fn from(StopRequest { force, timeout_ms }: StopRequest) -> Self {
        Self { force, timeout_ms }
    }
}

impl From<StopCommand> for StopRequest {
    fn from(StopCommand { force, timeout_ms }: StopCommand) -> Self {
        Self { force, timeout_ms }
    }
}

/// A published port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardCommand {
    /// Address of the host; the loopback if absent.
    #[serde(default)]
    pub host: Option<IpAddr>,
    /// Port of the host.
    #[serde(default)]
    pub host_port: u16,
    /// Port in the guest.
    pub guest_port: u16,
}

impl From<ForwardSpec> for ForwardCommand {
    fn from(ForwardSpec { host, host_port, guest_port }: ForwardSpec) -> Self {
        Self { host: Some(host), host_port, guest_port }
    }
}

impl From<ForwardCommand> for ForwardSpec {
    fn from(ForwardCommand { host, host_port, guest_port }: ForwardCommand) -> Self {
        Self { host: host.unwrap_or(IpAddr::from([127, 0, 0, 1])), host_port, guest_port }
    }
}

/// What a supervisor replies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Reply {
    /// Not the end: how far a start has come.
    Stage {
        /// The stage.
        stage: StartStage,
    },
    /// Done.
    Done,
    /// The forward as it stands now.
    Forward {
        /// With the port that was taken.
        forward: ForwardCommand,
    },
    /// What a VM does.
    Status {
        /// For how long nothing has used the VM; absent while something does.
        idle_ms: Option<u64>,
        /// What its network has done; absent if it has none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        network: Option<Box<NetworkInfo>>,
    },
    /// The guest has been saved, and the VM is gone.
    Baked {
        /// What was saved.
        bake: Box<Bake>,
    },
    /// It could not be done.
    Failed {
        /// Why.
        problem: ErrorRecord,
    },
    /// The supervisor belongs to another nido, and does not know the request. Nothing has been done.
    Unsupported {
        /// The newest version that the supervisor speaks.
        #[serde(default)]
        supported: u32,
        /// What it does not know.
        #[serde(default)]
        why: String,
    },
}

impl Reply {
    /// The reply about a request that failed.
    #[must_use]
    pub fn failed(error: &Error) -> Self {
        Self::Failed { problem: error.record() }
    }

    /// Whether no other reply follows.
    #[must_use]
    pub const fn is_last(&self) -> bool {
        !matches!(self, Self::Stage { .. })
    }
}

/// A message with its version.
#[derive(Serialize)]
struct Envelope<'a, T> {
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
    #[serde(flatten)]
    message: &'a T,
}

/// The line of a message, in that version.
///
/// # Errors
/// `internal`.
pub fn encode<T: Serialize>(message: &T, version: u32) -> Result<Vec<u8>> {
    let envelope = Envelope { version: (version > UNVERSIONED).then_some(version), message };
    let mut line = serde_json::to_vec(&envelope)
        .map_err(|e| Error::internal(format!("cannot write a message of the control socket: {e}")))?;
    line.push(b'\n');
    Ok(line)
}

/// The version of a line, and what else it holds. What is no JSON object has version 1.
fn open(line: &[u8]) -> (u32, Result<Value, String>) {
    match serde_json::from_slice::<Value>(line) {
        Ok(mut message) => {
            let version = message.as_object_mut().and_then(|fields| fields.remove("version"));
            let version = version.map_or(UNVERSIONED, |number| {
                number.as_u64().and_then(|number| u32::try_from(number).ok()).unwrap_or(u32::MAX)
            });
            (version, Ok(message))
        }
        Err(error) => (UNVERSIONED, Err(error.to_string())),
    }
}

/// The version in which a client is replied to, and its request; or, if this nido does not know it, the reply.
pub fn decode_request(line: &[u8]) -> (u32, Result<Request, Reply>) {
    let (version, message) = open(line);
    let unsupported = |why| Reply::Unsupported { supported: VERSION, why };
    if version > VERSION {
        return (VERSION, Err(unsupported(format!("version {version} of the control protocol"))));
    }
    let request = message.and_then(|message| serde_json::from_value(message).map_err(|error| error.to_string()));
    let refuse = |why: String| match version {
        // What a client of that version understands.
        UNVERSIONED => Reply::failed(&Error::new(Code::SpecInvalid, format!("{NOT_A_REQUEST}: {why}"))),
        _ => unsupported(why),
    };
    (version, request.map_err(refuse))
}

/// A supervisor's reply. One of another nido that this one cannot read, or that could not read the request, is
/// [`Reply::Unsupported`].
///
/// # Errors
/// `internal` if it is no reply of this nido's.
pub fn decode_reply(line: &[u8]) -> Result<Reply> {
    let (version, message) = open(line);
    let invalid = |why: String| Error::internal(format!("the supervisor's reply is invalid: {why}"));
    match serde_json::from_value(message.map_err(invalid)?) {
        Ok(Reply::Failed { problem })
            if version == UNVERSIONED
                && problem.slug() == Code::SpecInvalid.slug()
                && problem.message().starts_with(NOT_A_REQUEST) =>
        {
            Ok(Reply::Unsupported { supported: UNVERSIONED, why: problem.message().to_owned() })
        }
        Ok(reply) => Ok(reply),
        Err(error) if version > VERSION => Ok(Reply::Unsupported { supported: version, why: error.to_string() }),
        Err(error) => Err(invalid(error.to_string())),
    }
}

#[cfg(test)]
mod tests;

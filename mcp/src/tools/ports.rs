//! Ports of a guest, published on the host.

use futures::future::BoxFuture;
use nido_api::error::{Error, Result};
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::{ForwardList, ForwardSpec};
use serde::Deserialize;
use serde_json::Value;

use super::{Hints, Operation, Tool, arguments};
use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::schema;

pub const PORTS: Tool = Tool {
    op: op::VM_PORTS,
    title: "Publish ports",
    about: "Publishes a port of a VM on the host, or stops that; returns all published ports.",
    hints: Hints { idempotent: false, open_world: false },
    takes: schema::arguments::<PortArguments>,
    unlisted: &[],
    gives: schema::result::<ForwardList>,
    parse: |given| Ok(Box::new(Ports::parse(given)?)),
};

/// Which ports are published.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct PortArguments {
    name: VmName,
    /// HOST:GUEST, or GUEST for any.
    #[serde(default)]
    publish: Option<String>,
    #[serde(default)]
    unpublish: Option<String>,
}

#[derive(Debug)]
struct Ports {
    name: VmName,
    publish: Option<ForwardSpec>,
    unpublish: Option<ForwardSpec>,
}

impl Ports {
    fn parse(given: Value) -> Result<Self> {
        let PortArguments { name, publish, unpublish } = arguments(given)?;
        let port = |field: &str, text: Option<String>| {
            let wrong = |error: Error| Error::new(error.code(), format!("{field}: {}", error.message()));
            text.map(|text| text.parse::<ForwardSpec>().map_err(wrong)).transpose()
        };
        Ok(Self { name, publish: port("publish", publish)?, unpublish: port("unpublish", unpublish)? })
    }
}

impl Operation for Ports {
    fn vm(&self) -> Option<&VmName> {
        Some(&self.name)
    }

    fn only_reads(&self) -> bool {
        self.publish.is_none() && self.unpublish.is_none()
    }

    fn admit<'a>(&'a self, call: &'a CallContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            call.nido().await?.identity(call.which(&self.name))?;
            self.publish.as_ref().map_or(Ok(()), |port| call.limits.check_forward(port))
        })
    }

    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move {
            let (nido, vm) = (call.nido().await?, call.which(&self.name));
            if let Some(port) = &self.unpublish {
                nido.forward_remove(vm, port).await?;
            }
            if let Some(port) = self.publish {
                nido.forward_add(vm, port, &call.grant()).await?;
            }
            ToolResult::new(&nido.forward_list(vm)?)
        })
    }
}

//! Which VMs a verb acts on: those named, all of them, or those with a label; and the verb, done to each.
//!
//! Invariant: one name gives one VM as the answer; several, `--all` and `--filter` give a list, whatever is in it. What fails
//! for one VM does not keep the verb from the others.

use std::str::FromStr;

use nido_api::name::VmName;
use nido_api::{LabelFilter, VmInfo, VmList};
use nido_core::Nido;

use super::Context;
use crate::exit::{Codes, Exit, Failure, Outcome};

/// The VMs.
#[derive(Debug, Clone, clap::Args)]
pub struct Selection {
    /// Names of the VMs
    #[arg(required_unless_present_any = ["all", "filter"], conflicts_with_all = ["all", "filter"])]
    name: Vec<VmName>,
    /// All VMs to which the command applies
    #[arg(long, conflicts_with = "filter")]
    all: bool,
    /// VMs with a label, as label=KEY or label=KEY=VALUE; if repeated, those with all of them
    #[arg(long, value_name = "FILTER")]
    filter: Vec<Filter>,
}

/// One condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter(LabelFilter);

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let label = text.strip_prefix("label=").filter(|label| !label.is_empty() && !label.starts_with('='));
        let label = label.ok_or("use label=KEY or label=KEY=VALUE")?;
        let Ok(filter) = label.parse();
        Ok(Self(filter))
    }
}

impl Filter {
    /// The label that it is about.
    pub fn label(self) -> LabelFilter {
        self.0
    }
}

impl Selection {
    /// Whether the answer is one VM.
    pub const fn is_one(&self) -> bool {
        self.name.len() == 1
    }

    /// The names, each once. `can` returns whether the verb makes sense for a VM that was not named.
    pub fn names(&self, nido: &Nido, can: impl Fn(&VmInfo) -> bool) -> Result<Vec<VmName>, Failure> {
        if !self.name.is_empty() {
            let mut names = Vec::new();
            for name in &self.name {
                if !names.contains(name) {
                    names.push(name.clone());
                }
            }
            return Ok(names);
        }
        let is_meant = |vm: &&VmInfo| can(vm) && self.filter.iter().all(|filter| filter.0.holds(vm));
        Ok(nido.list()?.vms.iter().filter(is_meant).map(|vm| vm.name.clone()).collect())
    }

    /// Does something to each of the VMs, one after another, and answers with what they are then.
    pub async fn each(
        &self,
        cx: &Context,
        names: Vec<VmName>,
        mut act: impl AsyncFnMut(&VmName) -> Result<VmInfo, Failure>,
    ) -> Outcome {
        if self.is_one()
            && let [name] = &names[..]
        {
            return cx.acted(&act(name).await?);
        }
        each(cx, &names, act).await
    }
}

/// Does something to each of the VMs, one after another, and answers with the list of what they are then. An error of one is reported,
/// and the others follow.
pub async fn each(
    cx: &Context,
    names: &[VmName],
    mut act: impl AsyncFnMut(&VmName) -> Result<VmInfo, Failure>,
) -> Outcome {
    let (mut vms, mut exit) = (Vec::new(), Exit::Success);
    for name in names {
        match act(name).await {
            Ok(vm) => vms.push(vm),
            Err(Failure::Nido(error)) => {
                cx.output.error(&error);
                exit = Exit::of_error(&error, Codes::Own);
            }
            Err(other) => return Err(other),
        }
    }
    let list = VmList { vms };
    cx.output.answer(&list, || list.vms.iter().map(|vm| format!("{}\n", vm.name)).collect())?;
    Ok(exit)
}

/// Never fails: for verbs that can be done to every VM.
pub const fn every(_: &VmInfo) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_name_a_label() {
        let filter = |text: &str| Filter::from_str(text);
        assert_eq!(filter("label=a"), Ok(Filter("a".parse().unwrap())));
        assert_eq!(filter("label=a=b=c"), Ok(Filter(LabelFilter::with_value("a", "b=c"))));
        for bad in ["a", "label=", "label==b", "name=a"] {
            assert!(filter(bad).is_err(), "{bad}");
        }
    }
}

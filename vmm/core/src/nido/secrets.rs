//! Secrets: stored, listed, deleted, and which VMs may use them.
//!
//! Invariant: the command line, or an administrator in the limits of a policy or token, chooses the hosts of secrets: who chooses the
//! host of a secret can have it sent anywhere.

use nido_api::egress::Protocol;
use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::SecretName;
use nido_api::operation as op;
use nido_api::{Caller, Grant, NetChoice, SECRETS_MAX, SecretInfo, SecretList, SecretValue, VmSpec};
use nido_engine::secrets::{SecretCommand, Secrets};

use super::Nido;

impl Nido {
    /// Stores a secret, or replaces its value: VMs that use it get the new one with their next request.
    ///
    /// # Errors
    /// Of the file system.
    pub fn secret_set(&self, name: &SecretName, value: &SecretValue) -> Result<SecretInfo> {
        Secrets::of(self.home()).set(name, value)
    }

    /// Stores a secret, and the command that has printed its value, for [`Self::secret_command`].
    ///
    /// # Errors
    /// `spec_invalid`: the command is too long; of the file system.
    pub fn secret_set_with_command(
        &self,
        name: &SecretName,
        value: &SecretValue,
        command: &SecretCommand,
    ) -> Result<SecretInfo> {
        Secrets::of(self.home()).set_with_command(name, value, command)
    }

    /// The command that prints the value of a secret. nido runs it for the user at the command line only.
    ///
    /// # Errors
    /// `secret_not_found`; `spec_invalid` if the secret has no command.
    pub fn secret_command(&self, name: &SecretName) -> Result<SecretCommand> {
        let (_, command) = Secrets::of(self.home()).read(name)?;
        command.ok_or_else(|| {
            let again = op::SECRET_SET.command.unwrap_or_default();
            Error::new(Code::SpecInvalid, format!("the secret '{name}' was stored without a command"))
                .hint(Hint::command_line(format!("store it with nido {again} {name} --command CMD...")))
        })
    }

    /// Stores what the command of a secret has printed now. A secret that was deleted or stored again meanwhile stays as it is.
    ///
    /// # Errors
    /// `secret_not_found`, `spec_invalid`; of the file system.
    pub fn secret_refreshed(
        &self,
        name: &SecretName,
        value: &SecretValue,
        command: &SecretCommand,
    ) -> Result<SecretInfo> {
        let secrets = Secrets::of(self.home());
        if secrets.read(name)?.1.as_ref() != Some(command) {
            let words = format!("the secret '{name}' was stored again while its command ran; that value stays");
            return Err(Error::new(Code::SpecInvalid, words));
        }
        secrets.set_with_command(name, value, command)
    }

    /// All secrets, without their values, in order of name.
    ///
    /// # Errors
    /// Of the file system.
    pub fn secret_list(&self) -> Result<SecretList> {
        Ok(SecretList { secrets: Secrets::of(self.home()).list()? })
    }

    /// Deletes a secret. Requests of VMs that use it fail from now on.
    ///
    /// # Errors
    /// `secret_not_found`.
    pub fn secret_delete(&self, name: &SecretName) -> Result<SecretInfo> {
        Secrets::of(self.home()).delete(name)
    }

    /// Whether a new VM may use the secrets that its specification names.
    ///
    /// # Errors
    /// `denied`, `secret_not_found`, `spec_invalid`.
    pub(super) fn check_secrets(&self, spec: &VmSpec, grant: &Grant) -> Result<()> {
        check_secrets(spec, grant)?;
        let secrets = Secrets::of(self.home());
        for used in &spec.secrets {
            secrets.info(&used.name).map_err(|error| {
                error.hint(Hint::command_line(format!(
                    "nido {} {}",
                    op::SECRET_SET.command.unwrap_or_default(),
                    used.name
                )))
            })?;
        }
        Ok(())
    }
}

/// What of it needs no look at the home.
pub(super) fn check_secrets(spec: &VmSpec, grant: &Grant) -> Result<()> {
    let invalid = |words: String| Error::new(Code::SpecInvalid, words);
    check_variables(spec)?;
    if spec.secrets.is_empty() {
        return Ok(());
    }
    if grant.owner != Some(Caller::command_line().owner()) {
        grant.limits.check_secrets(&spec.secrets)?;
    }
    if spec.secrets.len() > SECRETS_MAX {
        return Err(invalid(format!("secrets: a VM uses at most {SECRETS_MAX} secrets")));
    }
    for (at, used) in spec.secrets.iter().enumerate() {
        let is_reached = match spec.net {
            NetChoice::Nat => true,
            NetChoice::None => false,
            NetChoice::Restricted => {
                spec.rules().iter().any(|rule| rule.protocol == Protocol::Tcp && rule.matches_name(&used.host))
            }
        };
        if !is_reached {
            let words = format!("secrets[{at}]: the VM does not reach {}, which gets '{}'", used.host, used.name);
            return Err(invalid(words).hint(format!("add the rule {}:443 to allow, with net restricted", used.host)));
        }
        if spec.secrets[..at].contains(used) {
            return Err(invalid(format!("secrets[{at}]: '{used}' is named twice")));
        }
    }
    Ok(())
}

/// Whether each variable has a placeholder of the VM's own secrets.
fn check_variables(spec: &VmSpec) -> Result<()> {
    let invalid = |words: String| Error::new(Code::SpecInvalid, words);
    if spec.secret_env.len() > SECRETS_MAX {
        return Err(invalid(format!("secret_env: a VM has at most {SECRETS_MAX} variables for secrets")));
    }
    for (at, one) in spec.secret_env.iter().enumerate() {
        if !spec.secrets.iter().any(|used| used.name == one.name) {
            let words = format!("secret_env[{at}]: the VM does not use the secret '{}'", one.name);
            return Err(invalid(words).hint("give the VM the secret, too: NAME@HOST[:HEADER]"));
        }
        if spec.secret_env[..at].iter().any(|other| other.variable == one.variable) {
            return Err(invalid(format!("secret_env[{at}]: {} is named twice", one.variable)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(net: NetChoice, allow: &[&str], secrets: &[&str]) -> VmSpec {
        let allow = allow.iter().map(|rule| rule.parse().unwrap()).collect();
        let secrets = secrets.iter().map(|used| used.parse().unwrap()).collect();
        VmSpec { net, allow, secrets, ..VmSpec::named("web".parse().unwrap()) }
    }

    #[test]
    fn a_secret_needs_a_host_that_is_reached_and_the_command_line() {
        let (user, secret) = (Grant::unlimited(&Caller::command_line()), ["key@api.example.com"]);
        let check = |net, allow: &[&str], grant: &Grant| {
            check_secrets(&spec(net, allow, &secret), grant).map_err(|error| error.code())
        };
        assert_eq!(check(NetChoice::Nat, &[], &user), Ok(()));
        assert_eq!(check(NetChoice::Restricted, &["*.example.com"], &user), Ok(()));
        for (net, allow) in [
            (NetChoice::None, &[][..]),
            (NetChoice::Restricted, &[]),
            (NetChoice::Restricted, &["example.com"]),
            (NetChoice::Restricted, &["api.example.com:443/udp"]),
        ] {
            assert_eq!(check(net, allow, &user), Err(Code::SpecInvalid), "{allow:?}");
        }
        let other = Grant { owner: Some("token:ci".into()), ..user };
        assert_eq!(check(NetChoice::Nat, &[], &other), Err(Code::Denied));
    }

    #[test]
    fn a_variable_needs_a_secret_of_the_vm_and_a_name_of_its_own() {
        let user = Grant::unlimited(&Caller::command_line());
        let check = |secrets: &[&str], variables: &[&str]| {
            let secret_env = variables.iter().map(|one| one.parse().unwrap()).collect();
            check_secrets(&VmSpec { secret_env, ..spec(NetChoice::Nat, &[], secrets) }, &user).map_err(|e| e.code())
        };
        assert_eq!(check(&["key@api.example.com"], &["A=key", "B=key"]), Ok(()));
        assert_eq!(check(&[], &["A=key"]), Err(Code::SpecInvalid));
        assert_eq!(check(&["key@api.example.com"], &["A=other"]), Err(Code::SpecInvalid));
        assert_eq!(check(&["key@api.example.com"], &["A=key", "A=key"]), Err(Code::SpecInvalid));
    }
}
